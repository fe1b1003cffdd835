"""A corpus in Megatron's .bin and .idx files, as megatron-core's datasets.

megatron-core maps both files and trusts them, so what is wrong in them is a crash somewhere inside or, worse, nothing.
Here every byte is read once, before a model is built.

Every rank builds the indices for itself and keeps them in memory, at 4 bytes per document and pass and 12 per sample.
They are a function of the files, the seed and the numbers of samples. Nothing is written, and no rank waits for others.
"""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from numpy.typing import NDArray

from hft_megatron.config.data import DataSource
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import UserError

HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("code", "u1"), ("sequences", "<u8"), ("document_ends", "<u8")])
"""The beginning of an .idx file (megatron.core.datasets.indexed_dataset). Behind it stand an int32 length per sequence,
an int64 byte offset per sequence, and an int64 per entry of the table of documents."""
MAGIC = b"MMIDIDX"
TokenType = type[np.integer[Any]]
TOKEN_TYPES: dict[int, TokenType] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""megatron-core's codes of whole numbers; a file of 6 or 7 holds fractions."""
READ_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True, eq=False)
class CorpusFiles:
    """What is known of a source once its files have been read."""

    prefix: str
    sequence_lengths: NDArray[np.int32]
    """Tokens of each sequence, which --split divides and megatron-core shuffles; shape (sequences,)."""
    digest: str
    """Of both files: SHA-256 of the index, and of the CRC-32 of every 64 MiB of the tokens."""
    has_end: bool
    """Whether the token that was asked for is there."""


def read_corpus_files(prefix: str, vocab_size: int, end: int | None = None) -> CorpusFiles:
    """Reads and checks PREFIX.idx and PREFIX.bin, and looks for the token ``end``; about 3 GB/s where a processor is
    the limit.

    Raises UserError for files that are missing, cut short, damaged or of two corpora, and for a token id that is not
    below ``vocab_size``.
    """
    index, tokens = _both_files(prefix)
    try:
        content = np.fromfile(index, dtype=np.uint8)
        token_type, lengths = _read_index(index, content)
        described = int(lengths.sum(dtype=np.int64)) * np.dtype(token_type).itemsize
        held = tokens.stat().st_size
        if held != described:
            raise UserError(
                f"{tokens} has {held} bytes, and {index.name} describes {described}: one of them was cut short or "
                f"belongs to another corpus; copy both files again."
            )
        checksums, has_end = _check_ids(tokens, token_type, vocab_size, end)
    except OSError as error:
        raise UserError(f"--data-path {prefix} can't be read: {error.strerror}.") from None
    digest = hashlib.sha256(content.data)
    digest.update(repr(checksums).encode())
    return CorpusFiles(prefix=prefix, sequence_lengths=lengths, digest=digest.hexdigest(), has_end=has_end)


def _both_files(prefix: str) -> tuple[Path, Path]:
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    missing = [path for path in (index, tokens) if not path.is_file()]
    if len(missing) == 1:
        there = tokens if missing[0] is index else index
        raise UserError(f"--data-path {prefix}: {missing[0]} is missing, and {there.name} is there; copy both files.")
    if missing and Path(prefix).suffix in (".bin", ".idx"):
        raise UserError(f"--data-path {prefix} names one of two files; give {prefix[:-4]}, which names both.")
    if missing:
        raise UserError(
            f"--data-path {prefix}: there are no files {index} and {tokens}; make them with "
            f"tools/preprocess_data.py, and give their path without .idx and .bin."
        )
    return index, tokens


def _read_index(path: Path, content: NDArray[np.uint8]) -> tuple[TokenType, NDArray[np.int32]]:
    """Type of the tokens and length of each sequence."""
    damaged = UserError(f"{path} is damaged, or no index of megatron-core's; make or copy it and its .bin again.")
    if content.nbytes < HEADER.itemsize:
        raise damaged
    [header] = content[: HEADER.itemsize].view(HEADER)
    sequences, document_ends = int(header["sequences"]), int(header["document_ends"])
    token_type = TOKEN_TYPES.get(int(header["code"]))
    # Of NumPy's fixed-width bytes the zeros at the end are not part.
    if header["magic"] != MAGIC or header["version"] != 1 or token_type is None:
        raise damaged
    if content.nbytes != HEADER.itemsize + sequences * (4 + 8) + document_ends * 8:
        raise damaged
    tables = content[HEADER.itemsize :].data
    lengths = np.frombuffer(tables, np.int32, sequences).copy()
    offsets = np.frombuffer(tables, np.int64, sequences, offset=4 * sequences)
    documents = np.frombuffer(tables, np.int64, document_ends, offset=12 * sequences)
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(token_type).itemsize
    sound = (
        sequences > 0
        and lengths.min() >= 0
        and offsets[0] == 0
        and np.array_equal(offsets[1:], ends[:-1])
        and document_ends > 0
        and documents[0] == 0
        and documents[-1] == sequences
        and bool((np.diff(documents) >= 0).all())
    )
    if not sound:
        raise damaged
    return token_type, lengths


def _check_ids(path: Path, token_type: TokenType, vocab_size: int, end: int | None) -> tuple[list[int], bool]:
    """The CRC-32 of every ``READ_BYTES`` of the tokens, and whether ``end`` is among them; all ids must be rows of the
    model's vocabulary."""
    checksums, before, count = [], 0, READ_BYTES // np.dtype(token_type).itemsize
    has_end = False
    with path.open("rb") as file:
        while (ids := np.fromfile(file, dtype=token_type, count=count)).size:
            wrong = ids.max() >= vocab_size or ids.min() < 0
            if wrong:
                place = int(np.argmax((ids < 0) | (ids >= vocab_size)))
                raise UserError(
                    f"{path} holds the id {ids[place]} (token {before + place}), and the model's vocabulary has "
                    f"{vocab_size} rows; use a corpus that was made with the model's tokenizer."
                )
            has_end = has_end or (end is not None and bool((ids == end).any()))
            checksums.append(zlib.crc32(ids.data))
            before += ids.size
    return checksums, has_end


IN_MEMORY = ""
"""As megatron-core's ``path_to_cache``: it writes indices nowhere, where None means a folder next to the data."""


class Samples(Protocol):
    """Samples by number: ``tokens``, ``labels`` int64 and ``loss_mask`` float32, each of shape (seq_length,)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class SampleCounts:
    """What is taken of a corpus."""

    seq_length: int
    train: int
    """Samples of all training steps."""
    valid: int
    """Samples of all validations."""


@dataclass(frozen=True, kw_only=True)
class SampleRules:
    """What samples are, beside how many."""

    seed: int
    eod_mask_loss: bool = False
    needs_ends: str | None = None
    """The option for which documents must end with the tokenizer's end token; None where none does."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Samples in the order in which a run takes them."""

    train: Samples
    valid: Samples | None
    digest: str
    """Of the files and their weights."""
    order_digest: str
    """Of the order of the training samples."""
    lines: tuple[str, ...]
    """For the log."""


def mock_corpus(tokenizer: Tokenizer, counts: SampleCounts, rules: SampleRules) -> Corpus:
    """megatron-core's made-up documents of counting numbers."""
    train, valid = _build(None, "1,1,1", tokenizer, counts, rules)
    return Corpus(
        train=train,
        valid=valid,
        digest=_sha256("mock data"),
        order_digest=_order_digest(train),
        lines=("--mock-data: counting numbers",),
    )


def read_corpus(
    sources: Sequence[DataSource],
    split: str,
    tokenizer: Tokenizer,
    counts: SampleCounts,
    rules: SampleRules,
    *,
    vocab_size: int,
) -> Corpus:
    """The samples of the files that ``sources`` name.

    Raises UserError for a mistake in the files and for a part of a source that is shorter than one sample.
    """
    files = [_read_files(source.path, vocab_size, tokenizer.eos_id, rules) for source in sources]
    lines = tuple(_checked_parts(source, found, split, counts) for source, found in zip(sources, files, strict=True))
    # The share of one source is everything, whatever its weight.
    weights = [source.weight if len(sources) > 1 else None for source in sources]
    blend = [source.path for source in sources], None if None in weights else weights
    try:
        train, valid = _build(blend, split, tokenizer, counts, rules)
    except IndexError:
        raise UserError(
            f"--data-path: {len(sources)} sources are too many for {counts.train} samples, of which each would get at "
            f"least one; join sources, or train longer."
        ) from None
    for samples, wanted, what in ((train, counts.train, "--train-iters"), (valid, counts.valid, "--eval-iters")):
        if samples is not None and len(samples) < wanted:
            raise UserError(
                f"--data-path: one pass over all sources is {len(samples)} samples of {counts.seq_length} tokens, and "
                f"{what} asks for {wanted}; write a weight before each source, with which they are repeated, or ask "
                f"for less."
            )
    digest = _sha256(*(f"{found.digest} {weight}" for found, weight in zip(files, weights, strict=True)))
    return Corpus(train=train, valid=valid, digest=digest, order_digest=_order_digest(train), lines=lines)


def _read_files(prefix: str, vocab_size: int, end: int, rules: SampleRules) -> CorpusFiles:
    """The files of one source, whose documents end as the rules need it."""
    found = read_corpus_files(prefix, vocab_size, None if rules.needs_ends is None else end)
    if rules.needs_ends is not None and not found.has_end:
        raise UserError(
            f"{rules.needs_ends} goes by the token {end}, with which the tokenizer ends a document, and {prefix}.bin "
            f"has none; make the corpus with it (--append-eod), or leave {rules.needs_ends} out."
        )
    return found


def _build(blend: Any, split: str, tokenizer: Tokenizer, counts: SampleCounts, rules: SampleRules) -> tuple[Any, Any]:
    """megatron-core's data sets for training and, where there are validations, for those."""
    try:
        import_module("megatron.core.datasets.helpers_cpp")
    except ImportError as error:
        raise UserError(
            f"This installation of megatron-core can't build samples ({error}); install its wheel, which has the "
            f"compiled part: `pip install --force-reinstall --only-binary :all: megatron-core`."
        ) from None
    config = GPTDatasetConfig(
        random_seed=rules.seed,
        sequence_length=counts.seq_length,
        blend=blend,
        split=split,
        path_to_cache=IN_MEMORY,
        tokenizer=_EndOfDocument(vocab_size=tokenizer.vocab_size, eod=tokenizer.eos_id),
        # Positions and attention follow from the batches.
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=rules.eod_mask_loss,
        create_attention_mask=False,
    )
    # A part that nobody asked for may be empty, and megatron-core counts passes over nothing without end.
    config.split_matrix[1:] = [config.split_matrix[1] if counts.valid else None, None]
    kind = MockGPTDataset if blend is None else GPTDataset
    builder = BlendedMegatronDatasetBuilder(kind, [counts.train, counts.valid, 0], lambda: True, config)
    train, valid, _ = builder.build()
    return train, valid


@dataclass(frozen=True, kw_only=True)
class _EndOfDocument:
    """What megatron-core asks of a tokenizer here. Without a ``pad`` it masks no id: samples hold no padding, and a
    tokenizer that pads with its unknown or end token has those in the text too."""

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size, "eod": self.eod}


def _checked_parts(source: DataSource, files: CorpusFiles, split: str, counts: SampleCounts) -> str:
    """A line about the parts of a source, each of which must hold a sample where one is taken from it."""
    # megatron-core's own numbers and rounding, so that what is checked is what it takes.
    train, valid, _ = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    said, sequences = [], len(files.sequence_lengths)
    for part, what, wanted in ((train, "training", counts.train), (valid, "validation", counts.valid)):
        if not wanted:
            continue
        start, stop = (round(end * float(sequences)) for end in part)
        lengths = files.sequence_lengths[start:stop]
        tokens = int(lengths.sum(dtype="int64"))
        if tokens <= counts.seq_length:
            raise UserError(
                f"--data-path {source.path}: --split {split} leaves {tokens} tokens in {len(lengths)} documents for "
                f"{what}, and one sample needs {counts.seq_length + 1} (--seq-length and the token behind it); change "
                f"one of them, or give more text."
            )
        said.append(f"{tokens:,} tokens in {len(lengths):,} documents for {what}")
    weight = "" if source.weight is None else f" (weight {source.weight:g})"
    return f"{source.path}{weight}: {', '.join(said)}"


def _order_digest(train: Any) -> str:
    """Equal for two numbers of samples of which the smaller one's order is the beginning of the larger one's."""
    datasets = getattr(train, "datasets", [train])
    digest = hashlib.sha256(repr(getattr(train, "weights", None)).encode())
    for dataset in datasets:
        for order in (dataset.document_index, dataset.shuffle_index):
            digest.update(memoryview(order))
    return digest.hexdigest()


def _sha256(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
