"""The examples of supervised fine-tuning: token ids and which of them are trained, for a whole data file.

The model sees ``tokens[:-1]`` of an example and predicts ``tokens[1:]``, so an example of L tokens has L-1 positions,
and that number is what the sequence length limits. Trained are the assistant's texts (or the completion) and the token
that ends each of them.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hft_megatron.data.chat import ChatError, ChatTemplate
from hft_megatron.data.records import Chat, Completion, Record, read_records
from hft_megatron.data.tokenizer import Piece, Place, Tokenizer
from hft_megatron.errors import UserError

LongExamples = Literal["error", "drop", "truncate"]
Encoded = tuple[NDArray[np.int32], NDArray[np.bool_]]
RECORDS_PER_BATCH = 1024
"""Records tokenized in one call; bounds memory and lets the tokenizer use its threads."""


@dataclass(frozen=True, kw_only=True)
class SftCounts:
    """What became of the records of a file."""

    read: int
    truncated: int
    dropped: int
    """Too long, or nothing trained left after truncation."""
    trained_tokens: int


@dataclass(frozen=True, kw_only=True, eq=False)
class SftDataset:
    """All examples, end to end in two flat arrays."""

    source: str
    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    """Example i is ``tokens[offsets[i]:offsets[i + 1]]``; shape (examples + 1,)."""
    seq_length: int
    counts: SftCounts
    digest: str
    """sha256 over the file, the template, the tokenizer and the length rule: equal digests mean equal examples."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def example(self, index: int) -> Encoded:
        """Token ids and trained mask of one example, both of shape (tokens,)."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[span], self.trained[span]

    def num_positions(self, index: int) -> int:
        """Predicted positions of one example: its tokens less one."""
        return int(self.offsets[index + 1] - self.offsets[index]) - 1

    def summary(self) -> str:
        """One line for the log, with everything that was shortened or left out."""
        counts = self.counts
        return (
            f"{self.source}: {len(self)} examples of {counts.read} records, {counts.trained_tokens} trained tokens of "
            f"{len(self.tokens)}, {counts.truncated} truncated and {counts.dropped} dropped (sequence length "
            f"{self.seq_length})"
        )


def load_sft_dataset(
    path: str | Path, tokenizer: Tokenizer, seq_length: int, long_examples: LongExamples
) -> SftDataset:
    """Tokenize a JSONL file (see ``records``).

    ``seq_length`` is in positions. Needs no model and no process group. Raises UserError naming file and line for a
    record that is malformed, can't be rendered, or is too long under ``error``, and for a file without examples.
    """
    path = Path(path)
    template = ChatTemplate(tokenizer.facts)
    kept: list[Encoded] = []
    read = truncated = dropped = 0
    for line, (ids, mask) in _encode_all(path, tokenizer, template):
        read += 1
        if len(ids) - 1 > seq_length:
            if long_examples == "error":
                raise UserError(
                    f"{path}:{line}: the example has {len(ids) - 1} positions, but --seq-length is {seq_length}; raise "
                    f"it or choose --long-examples drop or truncate."
                )
            ids, mask = ids[: seq_length + 1], mask[: seq_length + 1]
            if long_examples == "drop" or not mask[1:].any():
                dropped += 1
                continue
            truncated += 1
        elif not mask[1:].any():
            raise UserError(f"{path}:{line}: the example has no token to predict; give it a prompt or remove it.")
        kept.append((ids, mask))
    if not kept:
        reason = f"all {dropped} were longer than --seq-length {seq_length}" if dropped else "it is empty"
        raise UserError(f"the data file {path} holds no example to train on: {reason}.")
    trained_tokens = sum(int(mask[1:].sum()) for _, mask in kept)
    return SftDataset(
        source=str(path),
        tokens=np.concatenate([ids for ids, _ in kept]),
        trained=np.concatenate([mask for _, mask in kept]),
        offsets=np.concatenate([[0], np.cumsum([len(ids) for ids, _ in kept])]).astype(np.int64),
        seq_length=seq_length,
        counts=SftCounts(read=read, truncated=truncated, dropped=dropped, trained_tokens=trained_tokens),
        digest=_digest(path, tokenizer, seq_length, long_examples),
    )


def _encode_all(path: Path, tokenizer: Tokenizer, template: ChatTemplate) -> Iterator[tuple[int, Encoded]]:
    for batch in _batched(read_records(path)):
        pieces = [_pieces(path, record, tokenizer, template) for record in batch]
        for record, encoded in zip(batch, tokenizer.encode_pieces(pieces), strict=True):
            yield record.line, encoded


def _batched(records: Iterable[Record]) -> Iterator[Sequence[Record]]:
    rest = iter(records)
    while batch := list(islice(rest, RECORDS_PER_BATCH)):
        yield batch


def _pieces(path: Path, record: Record, tokenizer: Tokenizer, template: ChatTemplate) -> list[Piece]:
    if isinstance(record, Chat):
        try:
            return template.pieces(record.messages)
        except ChatError as error:
            raise UserError(f"{path}:{record.line}: {error}.") from error
    return completion_pieces(record, tokenizer)


def completion_pieces(record: Completion, tokenizer: Tokenizer) -> list[Piece]:
    """Beginning token, prompt, completion, end token.

    The completion is tokenized on its own, as a continuation: at generation the prompt's tokens are fixed and the
    model writes what follows, so a token that spans the seam could never be asked for. Tokenizing the two together,
    or the completion with a word-start mark, trains a wrong number of tokens at the seam.
    """
    begin = [] if tokenizer.bos_id is None else [tokenizer.special(tokenizer.bos_id, trained=False)]
    prompt = [Piece(text=record.prompt, place=Place.START, trained=False)] if record.prompt else []
    place = Place.INSIDE if record.prompt else Place.START
    completion = [Piece(text=record.completion, place=place, trained=True)] if record.completion else []
    return [*begin, *prompt, *completion, tokenizer.special(tokenizer.eos_id, trained=True)]


def _digest(path: Path, tokenizer: Tokenizer, seq_length: int, long_examples: str) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    facts = tokenizer.facts
    rule = [facts.identity, facts.chat_template, dict(facts.template_variables), seq_length, long_examples]
    digest.update(json.dumps(rule, sort_keys=True).encode())
    return digest.hexdigest()
