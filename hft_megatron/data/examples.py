"""Records to examples: token ids and which of them are trained, parts of long records, and counts of all this."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hft_megatron.config.data import LongExamples
from hft_megatron.config.names import DataFormat
from hft_megatron.data.chat import ChatError, ChatTemplate, LossRule
from hft_megatron.data.files.sources import SourceFiles
from hft_megatron.data.formats.completions import Completion
from hft_megatron.data.formats.conversations import NOTHING, Chat, PassedOver
from hft_megatron.data.formats.preference import Preference
from hft_megatron.data.formats.table import Record
from hft_megatron.data.record_errors import RecordErrors, RecordRefused, notes_of_keys, notes_of_token_names
from hft_megatron.data.records import RecordReader, RecordRules
from hft_megatron.data.tokenizer import Encoded, Piece, Place, Tokenizer
from hft_megatron.errors import UserError

RECORDS_PER_BATCH = 1024
"""Records tokenized in one call; bounds memory and lets the tokenizer use its threads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """Tokens of one record."""

    place: str
    """Place of the record, for errors."""
    format: DataFormat
    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    """Mask of the same shape as ``ids``: (tokens,)."""
    answers: int = 0
    """Trained stretches, one per answer; 0 where everything is trained."""
    empty_answers: int = 0
    """Answers without text: only the end token is learned."""
    untrained_turns: int = 0
    """Turns of the assistant that the record itself excludes from training."""
    repeated_prompt: bool = False
    """True if the completion repeated the prompt, which was removed from it."""
    is_conversation: bool = False
    """True if the chat template rendered it."""
    has_token_names: bool = False
    """True if its prompt or completion, verbatim texts, have names of special tokens in them."""
    keys: PassedOver = NOTHING


NO_LIMIT = sys.maxsize
"""A sequence length for looking at data without a model."""
Span = tuple[int, int]
"""The first token of an example within its record, and the one after its last."""


@dataclass(frozen=True, kw_only=True)
class ExampleRules:
    """Rules that decide, besides the tokenizer and its template, which examples a record becomes."""

    seq_length: int
    """Length of the longest example, in positions."""
    long_examples: LongExamples = "error"
    loss: LossRule = field(default_factory=LossRule)
    records: RecordRules = field(default_factory=RecordRules)


@dataclass(kw_only=True)
class SftCounts:
    """Counts of a source's records by what became of them. Grows while they are read."""

    read: int = 0
    truncated: int = 0
    dropped: int = 0
    """Records that are too long, or have nothing trained left after truncation."""
    split: int = 0
    """Records that are too long, and were made into several examples."""
    lost_tokens: int = 0
    """Tokens that are not predicted because they were cut off, dropped, or in a part of a split example without trained
    tokens."""
    tokens: int = 0
    trained_tokens: int = 0
    answers: int = 0
    empty_answers: int = 0
    """Answers of which only the end token is trained."""
    untrained_turns: int = 0
    """Turns of the assistant that their records exclude from training."""
    repeated_prompts: int = 0
    """Records whose completion repeated the prompt, which was removed from it."""
    conversations: int = 0
    """Records that the chat template rendered."""
    token_names: int = 0
    """Records of verbatim texts that have names of special tokens in them."""
    unread: dict[str, int] = field(default_factory=dict)
    """Records with each of the keys that are not read."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Records with each of the keys of --ignore-keys."""

    def add(self, example: Example, spans: Sequence[Span], rules: ExampleRules) -> None:
        """Count one more record, whose examples are ``spans``."""
        self.read += 1
        self.answers += example.answers
        self.empty_answers += example.empty_answers
        self.untrained_turns += example.untrained_turns
        self.repeated_prompts += example.repeated_prompt
        self.conversations += example.is_conversation
        self.token_names += example.has_token_names
        count_keys(self.unread, example.keys.unread)
        count_keys(self.ignored, example.keys.ignored)
        for start, stop in spans:
            self.tokens += stop - start
            self.trained_tokens += int(np.count_nonzero(example.trained[start + 1 : stop]))
        positions = len(example.ids) - 1
        if positions > rules.seq_length:
            self.dropped += not spans
            self.truncated += bool(spans) and rules.long_examples == "truncate"
            self.split += bool(spans) and rules.long_examples == "split"
            self.lost_tokens += positions - sum(stop - start - 1 for start, stop in spans)

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> "SftCounts":
        """The inverse of ``asdict``. In counts of earlier versions every record counts as a conversation."""
        return SftCounts(**{"conversations": saved["read"], **saved})

    def merge(self, other: "SftCounts") -> None:
        """Count another part of the source."""
        for each in fields(SftCounts):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, dict):
                for key, count in theirs.items():
                    mine[key] = mine.get(key, 0) + count
            else:
                setattr(self, each.name, mine + theirs)

    def notes(self, path: str) -> list[str]:
        """Lines for the log about parts of the records of source ``path`` that are not learned."""
        lines = []
        if self.untrained_turns:
            lines.append(f"{path}: turns not trained, by a key of their own: {self.untrained_turns:,}")
        if self.repeated_prompts:
            lines.append(
                f"{path}: prompts that completions repeated, removed from the completions: {self.repeated_prompts:,}"
            )
        if self.empty_answers:
            lines.append(
                f"{path}: {self.empty_answers:,} of {self.answers:,} answers are empty: only their end token is trained"
            )
        return lines + notes_of_token_names(path, self.token_names) + notes_of_keys(path, self.unread, self.ignored)

    def check_learnable(self, examples: int, path: str, rules: ExampleRules) -> None:
        """Raise UserError where the source ``path`` gave no ``examples``, or all of its answers are empty."""
        if examples == 0:
            dropped = f"all {self.dropped} were longer than --seq-length {rules.seq_length}"
            reason = dropped if self.dropped else "it is empty"
            raise UserError(f"the data file {path} holds no example to train on: {reason}.")
        self.check_answers(path)

    def check_answers(self, path: str) -> None:
        """Raise UserError where every answer of the source ``path`` is empty."""
        if 0 < self.answers == self.empty_answers:
            raise UserError(
                f"{path}: all {self.answers:,} answers are empty, so only end tokens would be learned; "
                f"name the key that has their text, or leave {path} out."
            )


def read_source(
    source: SourceFiles, tokenizer: Tokenizer, rules: ExampleRules, errors: RecordErrors
) -> tuple[list[Encoded], list[str], dict[str, Any]]:
    """The examples of a source in its order, the places of their records, and an account of it.

    Records that cannot be an example are added to ``errors``; if all are, there are no examples. Raises UserError for
    a file that cannot be read to its end, and for a source from which nothing can be learned.
    """
    kept: list[Encoded] = []
    places: list[str] = []
    formats: set[DataFormat] = set()
    counts = SftCounts()
    reader, errors_before = RecordReader(rules.records), len(errors)
    for example in _read_examples(source, reader, tokenizer, rules.loss, errors):
        formats.add(example.format)
        try:
            check_predicts(example)
            spans = spans_of(example, rules)
        except RecordRefused as refused:
            errors.add(example.place, refused)
            continue
        kept += [(example.ids[start:stop], example.trained[start:stop]) for start, stop in spans]
        places += [example.place] * len(spans)
        counts.add(example, spans, rules)
    if kept or len(errors) == errors_before:
        counts.check_learnable(len(kept), source.path, rules)
    return kept, places, {"formats": sorted(formats), "counts": asdict(counts), "use": asdict(reader.use())}


def _read_examples(
    source: SourceFiles, reader: RecordReader, tokenizer: Tokenizer, loss: LossRule, errors: RecordErrors
) -> Iterator[Example]:
    template = ChatTemplate(tokenizer.facts, loss)
    rest = reader.read(source.files, errors)
    while batch := list(islice(rest, RECORDS_PER_BATCH)):
        found: list[tuple[Record, DataFormat, list[Piece]]] = []
        for known, record in batch:
            try:
                found.append((record, known, pieces_of(record, tokenizer, template, loss)))
            except UserError as error:
                errors.add(record.place, error)
        encoded = tokenizer.encode_pieces([pieces for *_, pieces in found])
        for (record, known, pieces), of_record in zip(found, encoded, strict=True):
            yield example_of(record, known, pieces, of_record, template, loss)


def example_of(
    record: Record,
    format: DataFormat,
    pieces: Sequence[Piece],
    encoded: Encoded,
    template: ChatTemplate,
    loss: LossRule,
) -> Example:
    """The example of a record, with counts of what was done with it."""
    ids, trained = encoded
    answers, empty = (0, 0) if loss.loss_on == "all" else _count_answers(pieces)
    return Example(
        place=record.place,
        format=format,
        ids=ids,
        trained=trained,
        answers=answers,
        empty_answers=empty,
        untrained_turns=_count_untrained(record),
        repeated_prompt=not isinstance(record, Preference) and record.repeated,
        is_conversation=isinstance(record, Chat),
        has_token_names=isinstance(record, Completion) and template.named_in(record.prompt, record.completion),
        keys=passed_over(record, template),
    )


def passed_over(record: Record, template: ChatTemplate) -> PassedOver:
    """The keys that are not read, including harmless ones of messages that the template doesn't print."""
    if not isinstance(record, Chat):
        return record.keys
    unread = dict.fromkeys([*record.keys.unread, *template.unread_keys(record.messages)])
    return PassedOver(unread=tuple(unread), ignored=record.keys.ignored)


def _count_answers(pieces: Sequence[Piece]) -> tuple[int, int]:
    runs = [list(run) for trained, run in groupby(pieces, key=lambda piece: piece.trained) if trained]
    texts = ["".join(piece.text for piece in run if piece.place is not Place.SPECIAL) for run in runs]
    return len(texts), sum(not text.strip() for text in texts)


def _count_untrained(record: Record) -> int:
    if not isinstance(record, Chat):
        return 0
    return sum(record.messages[index]["role"] == "assistant" for index in record.untrained if index >= record.given)


def pieces_of(record: Record, tokenizer: Tokenizer, template: ChatTemplate, loss: LossRule) -> list[Piece]:
    """The text of a record, cut at its token boundaries. Raises UserError naming a record that cannot be an example."""
    if isinstance(record, Preference):
        raise UserError(
            f"{record.place}: the record is a preference pair (`chosen` and `rejected`), which this command cannot "
            f"learn from; train on pairs with hft-megatron dpo, or give records with one answer."
        )
    if isinstance(record, Completion):
        return completion_pieces(record, tokenizer, loss)
    assert isinstance(record, Chat)
    try:
        return template.pieces(record.messages, given=record.given, untrained=record.untrained)
    except ChatError as error:
        raise UserError(f"{record.place}: {error}.") from error


def completion_pieces(record: Completion, tokenizer: Tokenizer, loss: LossRule) -> list[Piece]:
    """Begin token, prompt, completion, end token.

    The completion is tokenized on its own, as a continuation: at generation the prompt's tokens are fixed and the
    model writes the tokens after them, so a token across the seam could never be generated. Tokenizing both together,
    or the completion with a word-start mark, trains a wrong number of tokens at the seam.
    """
    everything = loss.loss_on == "all"
    begin = [] if tokenizer.bos_id is None else [tokenizer.special(tokenizer.bos_id, trained=everything)]
    prompt = [Piece(text=record.prompt, place=Place.START, trained=everything)] if record.prompt else []
    place = Place.INSIDE if record.prompt else Place.START
    completion = [Piece(text=record.completion, place=place, trained=True)] if record.completion else []
    return [*begin, *prompt, *completion, tokenizer.special(tokenizer.eos_id, trained=loss.train_on_eos)]


def check_predicts(example: Example) -> None:
    """Raise RecordRefused for an example from which nothing can be learned."""
    if example.trained[1:].any():
        return
    if example.untrained_turns:
        raise RecordRefused(
            example.place,
            "the example has no token to predict, because its messages exclude every answer from training; "
            "correct them, or remove it.",
        )
    raise RecordRefused(example.place, "the example has no token to predict; give it a prompt or remove it.")


def spans_of(example: Example, rules: ExampleRules) -> list[Span]:
    """The parts of the example to train on: all of it, and where it is too long the parts that the rules choose.

    A part of a split example begins with the last token that the part before it predicted, so that each token is
    predicted once. Raises RecordRefused for an example that is too long under ``error``.
    """
    size, length = len(example.ids), rules.seq_length
    if size - 1 <= length:
        return [(0, size)]
    if rules.long_examples == "error":
        raise RecordRefused(
            example.place,
            f"the example has {{}} positions, but --seq-length is {length}; choose --long-examples drop, truncate or "
            f"split, or raise --seq-length if the model has more positions.",
            size - 1,
        )
    starts = {"drop": range(0), "truncate": range(1), "split": range(0, size - 1, length)}[rules.long_examples]
    spans = [(start, min(start + length + 1, size)) for start in starts]
    return [(start, stop) for start, stop in spans if example.trained[start + 1 : stop].any()]


def count_keys(counts: dict[str, int], keys: Iterable[str]) -> None:
    """Count one more record with these keys."""
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
