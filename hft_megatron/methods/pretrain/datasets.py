"""A corpus in Megatron's .bin and .idx files, as megatron-core's datasets.

Every rank builds the indices for itself and keeps them in memory, at 4 bytes per document and pass and 12 per sample.
They are a function of the files, the seed and the numbers of samples. Nothing is written, and no rank waits for others,
unless a folder is given to keep them in.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset

from hft_megatron.config.data import DataSource
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import UserError
from hft_megatron.methods.pretrain.files import CorpusFiles, read_corpus_files
from hft_megatron.methods.pretrain.indices import kept_in

IN_MEMORY = ""
"""Value of megatron-core's ``path_to_cache`` that writes no indices; None means a folder next to the data."""


class Samples(Protocol):
    """Samples by number: ``tokens``, ``labels`` int64 and ``loss_mask`` float32, each of shape (seq_length,)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class SampleCounts:
    """Numbers of samples that a run takes of a corpus."""

    seq_length: int
    train: int
    """Samples of all training steps."""
    valid: int
    """Samples of all validations."""


@dataclass(frozen=True, kw_only=True)
class SampleRules:
    """Rules of the samples, beside their number."""

    seed: int
    eod_mask_loss: bool = False
    needs_ends: str | None = None
    """The option for which documents must end with the tokenizer's end token; None where none needs it."""
    kept_in: Path | None = None
    """Folder for the indices of samples; None: they stay in memory."""


@dataclass(frozen=True, kw_only=True)
class CorpusSources:
    """Sources of samples."""

    train: tuple[DataSource, ...]
    valid: tuple[DataSource, ...] = ()
    """Validation sources; empty where ``split`` divides those of ``train``, and without validation."""
    split: str | None = None
    """Value of --split; None where every part has sources of its own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Samples in the order in which a run takes them."""

    train: Samples | None
    """None where nothing is trained."""
    valid: Samples | None
    digest: str | None
    """Digest of the training files and their weights."""
    order_digest: str | None
    """Digest of the order of the training samples."""
    lines: tuple[str, ...]
    """Lines for the log."""


def mock_corpus(tokenizer: Tokenizer, counts: SampleCounts, rules: SampleRules) -> Corpus:
    """megatron-core's made-up documents of counting numbers, which it makes in three equal parts."""
    train, valid = _build({"split": "1,1,1"}, tokenizer, counts, rules)
    return Corpus(
        train=train,
        valid=valid,
        digest=_sha256("mock data") if counts.train else None,
        order_digest=_order_digest(train),
        lines=("--mock-data: counting numbers, in thirds for training, validation and test whatever --split says",),
    )


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The samples taken for one purpose."""

    number: int
    """megatron-core's number of the split: 0 for training, 1 for validation."""
    what: str
    wanted: int
    """Number of samples."""
    asked_by: str
    """The option that asks for them."""
    option: str
    """The option that names the sources."""
    sources: tuple[DataSource, ...]
    within: tuple[float, float]
    """Range of every source's documents, as shares of all."""


def read_corpus(
    sources: CorpusSources, tokenizer: Tokenizer, counts: SampleCounts, rules: SampleRules, *, vocab_size: int
) -> Corpus:
    """The samples of the files that ``sources`` name.

    Raises UserError for an error in the files and for a part of a source that is shorter than one sample.
    """
    parts = _parts(sources, counts)
    held = {
        source.path: _read_files(source.path, vocab_size, tokenizer.eos_id, rules, option=part.option)
        for part in parts
        for source in part.sources
    }
    lines = _checked_lines(parts, held, sources.split, counts.seq_length)
    if sources.split is not None:
        built = _build_parts(parts, {"blend": _blend(sources.train), "split": sources.split}, tokenizer, counts, rules)
    else:
        built = [None, None]
        for part in parts:
            blends = {"blend_per_split": _only(part.number, part)}
            built[part.number] = _build_parts([part], blends, tokenizer, counts, rules)[part.number]
    train, valid = built
    for part in parts:
        samples = built[part.number]
        if len(samples) < part.wanted:
            raise UserError(
                f"{part.option}: one pass over all sources is {len(samples)} samples of {counts.seq_length} tokens, "
                f"and {part.asked_by} asks for {part.wanted}; write a weight before each source, which lets them "
                f"repeat, or ask for less."
            )
    if rules.kept_in is not None:
        lines.append(f"indices of samples are kept in {rules.kept_in}")
    is_weighted = _blend(sources.train)[1] is not None
    trained = () if train is None else sources.train
    digests = [f"{held[one.path].digest} {one.weight if is_weighted else None}" for one in trained]
    return Corpus(
        train=train,
        valid=valid,
        digest=_sha256(*digests) if digests else None,
        order_digest=_order_digest(train),
        lines=tuple(lines),
    )


def _parts(sources: CorpusSources, counts: SampleCounts) -> list[_Part]:
    """The parts that samples are taken from: training and validation, where they are asked for."""
    everything = (0.0, 1.0)
    within: list[tuple[float, float]] = [everything, everything]
    options = ["--train-data-path", "--valid-data-path"]
    if sources.split is not None:
        # megatron-core's own numbers and rounding, so that the check sees what it takes.
        within = [part or (1.0, 1.0) for part in convert_split_vector_to_split_matrix(_normalized(sources.split))]
        options = ["--data-path"] * 2
    train = _Part(
        number=0,
        what="training",
        wanted=counts.train,
        asked_by="--train-iters",
        option=options[0],
        sources=sources.train,
        within=within[0],
    )
    valid = replace(
        train,
        number=1,
        what="validation",
        wanted=counts.valid,
        asked_by="--eval-iters",
        option=options[1],
        sources=sources.train if sources.split is not None else sources.valid,
        within=within[1],
    )
    return [part for part in (train, valid) if part.wanted]


def _blend(sources: Sequence[DataSource]) -> tuple[list[str], list[float] | None]:
    """The blend in megatron-core's form; the share of one source is everything, whatever its weight."""
    weights = [source.weight for source in sources if source.weight is not None]
    return [source.path for source in sources], weights if weights and len(sources) > 1 else None


def _only(number: int, part: _Part) -> list[Any]:
    """``blend_per_split`` for one part alone."""
    return [_blend(part.sources) if number == place else None for place in range(3)]


def _build_parts(
    parts: Sequence[_Part], blends: dict[str, Any], tokenizer: Tokenizer, counts: SampleCounts, rules: SampleRules
) -> list[Any]:
    """Calls ``_build`` and turns megatron-core's failure at too many sources into a UserError."""
    try:
        return _build(blends, tokenizer, counts, rules)
    except IndexError:
        part = parts[0]
        raise UserError(
            f"{part.option}: {len(part.sources)} sources are too many for {part.wanted} samples, of which each source "
            f"would get at least one; join sources, or ask for more samples."
        ) from None


def _read_files(prefix: str, vocab_size: int, end: int, rules: SampleRules, *, option: str) -> CorpusFiles:
    """The files of one source, whose documents end as the rules need it."""
    found = read_corpus_files(prefix, vocab_size, None if rules.needs_ends is None else end, option=option)
    if rules.needs_ends is not None and not found.has_end:
        raise UserError(
            f"{rules.needs_ends} needs the token {end}, with which the tokenizer ends a document, but {prefix}.bin "
            f"has none; make the corpus with it (--append-eod), or leave {rules.needs_ends} out."
        )
    return found


def _build(blends: dict[str, Any], tokenizer: Tokenizer, counts: SampleCounts, rules: SampleRules) -> list[Any]:
    """megatron-core's data sets for training and for validation; None where it takes nothing for one."""
    try:
        import_module("megatron.core.datasets.helpers_cpp")
    except ImportError as error:
        raise UserError(
            f"This installation of megatron-core cannot build samples ({error}); install its wheel, which has the "
            f"compiled part: `pip install --force-reinstall --only-binary :all: megatron-core`."
        ) from None
    config = GPTDatasetConfig(
        random_seed=rules.seed,
        sequence_length=counts.seq_length,
        **blends,
        path_to_cache=IN_MEMORY,
        tokenizer=_EndOfDocument(vocab_size=tokenizer.vocab_size, eod=tokenizer.eos_id),
        # Positions and attention follow from the batches.
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=rules.eod_mask_loss,
        create_attention_mask=False,
    )
    if config.split_matrix is not None:
        # A part that nobody asked for may be empty, and megatron-core would count passes over it forever.
        wanted = (counts.train, counts.valid, 0)
        config.split_matrix[:] = [
            part if count else None for part, count in zip(config.split_matrix, wanted, strict=True)
        ]
    kind = GPTDataset if rules.kept_in is None else kept_in(rules.kept_in)
    builder = BlendedMegatronDatasetBuilder(
        MockGPTDataset if config.mock else kind, [counts.train, counts.valid, 0], lambda: True, config
    )
    train, valid, _ = builder.build()
    return [train, valid]


@dataclass(frozen=True, kw_only=True)
class _EndOfDocument:
    """The tokenizer that megatron-core needs here. Without a ``pad`` it masks no id: samples hold no padding, and a
    tokenizer that pads with its unknown or end token has those in the text too."""

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size, "eod": self.eod}


def _checked_lines(
    parts: Sequence[_Part], held: Mapping[str, CorpusFiles], split: str | None, seq_length: int
) -> list[str]:
    """A line about each source, every part of which must hold a sample."""
    said: dict[tuple[int, str], list[str]] = {}
    for part in parts:
        for number, source in enumerate(part.sources):
            every = held[source.path].sequence_lengths
            start, stop = (round(end * float(len(every))) for end in part.within)
            lengths = every[start:stop]
            tokens = int(lengths.sum(dtype="int64"))
            if tokens <= seq_length:
                divided = "it has" if split is None else f"--split {split} leaves"
                raise UserError(
                    f"{part.option} {source.path}: {divided} {tokens} tokens in {len(lengths)} documents for "
                    f"{part.what}, but one sample needs {seq_length + 1} (--seq-length and the token after it); "
                    f"lower --seq-length, or give more text."
                )
            weight = "" if source.weight is None else f" (weight {source.weight:g})"
            found = said.setdefault((number, f"{source.path}{weight}"), [])
            found.append(f"{tokens:,} tokens in {len(lengths):,} documents for {part.what}")
    return [f"{name}: {', '.join(found)}" for (_, name), found in said.items()]


def _normalized(split: str) -> list[float]:
    shares: list[float] = parse_and_normalize_split(split)
    return shares


def _order_digest(train: Any) -> str | None:
    """Equal for two numbers of samples if the order of the smaller is the beginning of the larger one's order."""
    if train is None:
        return None
    datasets = getattr(train, "datasets", [train])
    digest = hashlib.sha256(repr(getattr(train, "weights", None)).encode())
    for dataset in datasets:
        for order in (dataset.document_index, dataset.shuffle_index):
            digest.update(memoryview(order))
    return digest.hexdigest()


def _sha256(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
