"""Reads preference pairs and tokenizes both of their halves."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import numpy as np

from hft_megatron.config.dpo import BadPairs
from hft_megatron.data.chat import ChatError, ChatTemplate, LossRule
from hft_megatron.data.dataset import ExamplesInMemory, places_in
from hft_megatron.data.examples import RECORDS_PER_BATCH, ExampleRules, completion_pieces, count_keys
from hft_megatron.data.files.sources import SourceFiles
from hft_megatron.data.formats.completions import Completion
from hft_megatron.data.formats.conversations import Message
from hft_megatron.data.formats.preference import Preference, PromptForm
from hft_megatron.data.formats.table import Record
from hft_megatron.data.record_errors import RecordErrors, RecordRefused
from hft_megatron.data.records import RecordReader
from hft_megatron.data.token_cache import Tokenized
from hft_megatron.data.tokenizer import Encoded, Piece, SpecialTokens, Tokenizer
from hft_megatron.errors import UserError


class BadPair(Exception):
    """A pair from which nothing can be learned; the message is a clause."""


def check_record(pair: Preference) -> None:
    """Raise BadPair for a problem that the record itself shows."""
    if pair.problem is not None:
        raise BadPair(pair.problem)
    for key, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if _is_empty(answer):
            raise BadPair(f"the answer in `{key}` is empty")
    if pair.chosen == pair.rejected:
        raise BadPair("`chosen` and `rejected` are the same")


def _is_empty(answer: str | Sequence[Message]) -> bool:
    if isinstance(answer, str):
        return not answer.strip()
    return not (answer[-1]["content"] or "").strip() and answer[-1].keys() <= {"role", "content"}


def check_room(halves: Sequence[Encoded], rules: ExampleRules) -> None:
    """Raise BadPair where no trained token of a half is within the sequence length."""
    for _, mask in halves:
        if not mask[1 : rules.seq_length + 1].any():
            raise BadPair("the prompt leaves no room for an answer within --seq-length")


def check_length(positions: int, place: str, rules: ExampleRules) -> None:
    """Raise RecordRefused for a pair whose longer half is too long under ``error``."""
    if positions > rules.seq_length and rules.long_examples == "error":
        raise RecordRefused(
            place,
            f"the prompt and an answer have {{}} positions, but --seq-length is {rules.seq_length}; choose "
            f"--long-examples drop or truncate, or raise --seq-length if the model has more positions.",
            positions,
        )


def check_halves(halves: Sequence[Encoded]) -> None:
    """Raise BadPair where nothing can be learned from the halves, cut to the sequence length."""
    prompts = []
    for ids, mask in halves:
        prompts.append(ids[: int(np.argmax(mask))])
    if not np.array_equal(prompts[0], prompts[1]):
        raise BadPair("the two answers follow different tokens: their prompts differ, or the chat template makes them")
    if np.array_equal(halves[0][0], halves[1][0]):
        raise BadPair("`chosen` and `rejected` have the same tokens within --seq-length")


def tokenize_pairs(
    sources: Sequence[SourceFiles], tokenizer: Tokenizer, rules: ExampleRules, bad_pairs: BadPairs
) -> Tokenized:
    """The answers of all sources, and an account of each source. Raises UserError with every kind of error."""
    errors, kept, places = RecordErrors(), list[Encoded](), list[str]()
    accounts = []
    for source in sources:
        answers, of_source, account = _read_source(source, tokenizer, rules, bad_pairs, errors)
        kept += answers
        places += places_in(source.files, of_source)
        accounts.append(account)
    errors.raise_if_any()
    return Tokenized(store=ExamplesInMemory.of(kept, places), account={"sources": accounts})


def _read_source(
    source: SourceFiles, tokenizer: Tokenizer, rules: ExampleRules, bad_pairs: BadPairs, errors: RecordErrors
) -> tuple[list[Encoded], list[str], dict[str, Any]]:
    """The answers of a source, the places of their records, and the account of it."""
    kept: list[Encoded] = []
    places: list[str] = []
    bad: Counter[str] = Counter()
    forms: Counter[PromptForm] = Counter()
    read = truncated = dropped = conversations = token_names = 0
    tokens = SpecialTokens(tokenizer.facts.special_tokens)
    unread: dict[str, int] = {}
    ignored: dict[str, int] = {}
    reader, errors_before = RecordReader(replace(rules.records, data_format="preference")), len(errors)
    records = reader.read(source.files, errors)
    for pair, halves in encoded_pairs((record for _, record in records), tokenizer, rules.loss, errors):
        read += 1
        count_keys(unread, pair.keys.unread)
        count_keys(ignored, pair.keys.ignored)
        conversations += not isinstance(pair.chosen, str)
        texts = [part for part in (pair.prompt, pair.chosen, pair.rejected) if isinstance(part, str)]
        token_names += tokens.named_in(*texts)
        longest = max(len(ids) - 1 for ids, _ in halves)
        try:
            fitting = _fitting(pair, halves, longest, rules)
        except BadPair as problem:
            if bad_pairs == "error":
                sentence = f"{problem}; correct the pair, or choose --dpo-bad-pairs skip."
                errors.add(pair.place, RecordRefused(pair.place, sentence))
            else:
                bad[str(problem)] += 1
            continue
        except RecordRefused as refused:
            errors.add(pair.place, refused)
            continue
        if fitting is None:
            dropped += 1
            continue
        truncated += longest > rules.seq_length
        kept += fitting
        places += [pair.place] * len(fitting)
        forms[pair.form] += 1
    if not kept and len(errors) == errors_before:
        left_out = dropped + bad.total()
        why = f"all {left_out} were left out" if left_out else "it is empty"
        raise UserError(f"the data file {source.path} holds no pair to train on: {why}.")
    account = {
        "pairs": len(kept) // 2,
        "read": read,
        "truncated": truncated,
        "dropped": dropped,
        "bad": bad.most_common(),
        "unread": unread,
        "ignored": ignored,
        "conversations": conversations,
        "token_names": token_names,
        "forms": forms,
        "use": asdict(reader.use()),
    }
    return kept, places, account


def _fitting(
    pair: Preference, halves: tuple[Encoded, Encoded], longest: int, rules: ExampleRules
) -> list[Encoded] | None:
    """The trained part of each answer, or None where the pair is left out for its length.

    Raises BadPair where nothing can be learned from it, and RecordRefused.
    """
    check_record(pair)
    if longest > rules.seq_length and rules.long_examples == "drop":
        return None
    check_room(halves, rules)
    check_length(longest, pair.place, rules)
    fitting = [(ids[: rules.seq_length + 1], mask[: rules.seq_length + 1]) for ids, mask in halves]
    check_halves(fitting)
    return fitting


def encoded_pairs(
    records: Iterator[Record], tokenizer: Tokenizer, loss: LossRule, errors: RecordErrors
) -> Iterator[tuple[Preference, tuple[Encoded, Encoded]]]:
    """Each pair with its two halves: the prompt with the chosen answer, and with the rejected one.

    Pairs that the chat template refuses are added to ``errors``.
    """
    template = ChatTemplate(tokenizer.facts, loss)
    while batch := list(islice(records, RECORDS_PER_BATCH)):
        pairs: list[Preference] = []
        pieces: list[list[Piece]] = []
        for pair in batch:
            assert isinstance(pair, Preference)
            try:
                pieces += [_pieces(pair, answer, tokenizer, template, loss) for answer in (pair.chosen, pair.rejected)]
                pairs.append(pair)
            except UserError as error:
                errors.add(pair.place, error)
        encoded = tokenizer.encode_pieces(pieces)
        for number, pair in enumerate(pairs):
            yield pair, (encoded[2 * number], encoded[2 * number + 1])


def _pieces(
    pair: Preference,
    answer: str | tuple[Message, ...],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    loss: LossRule,
) -> list[Piece]:
    if isinstance(answer, str):
        assert isinstance(pair.prompt, str)
        return completion_pieces(Completion(place=pair.place, prompt=pair.prompt, completion=answer), tokenizer, loss)
    assert not isinstance(pair.prompt, str)
    try:
        return template.pieces([*pair.prompt, *answer], given=len(pair.prompt))
    except ChatError as error:
        raise UserError(f"{pair.place}: {error}.") from error
