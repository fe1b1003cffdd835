"""Records to examples: token ids and which of them are trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
from numpy.typing import NDArray

from hft_megatron.config.names import DataFormat
from hft_megatron.data.chat import ChatError, ChatTemplate, LossRule
from hft_megatron.data.faults import Faults
from hft_megatron.data.files.sources import SourceFiles
from hft_megatron.data.formats.completions import Completion
from hft_megatron.data.formats.conversations import NOTHING, Chat, PassedOver
from hft_megatron.data.formats.preference import Preference
from hft_megatron.data.formats.table import Record
from hft_megatron.data.records import RecordReader
from hft_megatron.data.stores import Encoded
from hft_megatron.data.tokenizer import Piece, Place, Tokenizer
from hft_megatron.errors import UserError

RECORDS_PER_BATCH = 1024
"""Records tokenized in one call; bounds memory and lets the tokenizer use its threads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One record's tokens."""

    place: str
    """Of the record, for errors."""
    format: DataFormat
    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    """Of the same shape as ``ids``: (tokens,)."""
    answers: int = 0
    """Stretches that are trained, one per answer; 0 where everything is."""
    empty_answers: int = 0
    """Those without text: nothing but the end token is learned."""
    untrained_turns: int = 0
    """Turns of the assistant that the record itself takes out of what is learned."""
    repeated_prompt: bool = False
    """Whether the completion repeated the prompt, and it was taken off."""
    is_conversation: bool = False
    """Whether the chat template rendered it."""
    has_token_names: bool = False
    """Whether its prompt or completion, verbatim texts, have names of special tokens in them."""
    keys: PassedOver = NOTHING


def read_examples(
    source: SourceFiles, reader: RecordReader, tokenizer: Tokenizer, loss: LossRule, faults: Faults
) -> Iterator[Example]:
    """The examples of a source in its order; records that can't be one are counted among the ``faults``.

    Raises UserError for a file that can't be read on.
    """
    template = ChatTemplate(tokenizer.facts, loss)
    rest = reader.read(source.files, faults)
    while batch := list(islice(rest, RECORDS_PER_BATCH)):
        found: list[tuple[Record, DataFormat, list[Piece]]] = []
        for known, record in batch:
            try:
                found.append((record, known, pieces_of(record, tokenizer, template, loss)))
            except UserError as error:
                faults.add(record.place, error)
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
    """The example that a record became, with the account of what was made of it."""
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
    """The keys that nothing was made of, harmless ones of messages that the template doesn't print among them."""
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
    """The text of a record, cut where its tokens are. Raises UserError naming a record that can't be an example."""
    if isinstance(record, Preference):
        raise UserError(
            f"{record.place}: the record is a preference pair (`chosen` and `rejected`), of which this command can't "
            f"learn; train on pairs with hft-megatron dpo, or give records with one answer."
        )
    if isinstance(record, Completion):
        return completion_pieces(record, tokenizer, loss)
    assert isinstance(record, Chat)
    try:
        return template.pieces(record.messages, given=record.given, untrained=record.untrained)
    except ChatError as error:
        raise UserError(f"{record.place}: {error}.") from error


def completion_pieces(record: Completion, tokenizer: Tokenizer, loss: LossRule) -> list[Piece]:
    """Beginning token, prompt, completion, end token.

    The completion is tokenized on its own, as a continuation: at generation the prompt's tokens are fixed and the
    model writes what follows, so a token that spans the seam could never be asked for. Tokenizing the two together,
    or the completion with a word-start mark, trains a wrong number of tokens at the seam.
    """
    everything = loss.loss_on == "all"
    begin = [] if tokenizer.bos_id is None else [tokenizer.special(tokenizer.bos_id, trained=everything)]
    prompt = [Piece(text=record.prompt, place=Place.START, trained=everything)] if record.prompt else []
    place = Place.INSIDE if record.prompt else Place.START
    completion = [Piece(text=record.completion, place=place, trained=True)] if record.completion else []
    return [*begin, *prompt, *completion, tokenizer.special(tokenizer.eos_id, trained=loss.train_on_eos)]
