"""Preference pairs as tokens: for every pair the prompt with the chosen answer, and the prompt with the rejected one.

Trained are the answers' tokens alone, also where the prompt holds turns of the assistant.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from hft_megatron.config.schema import BadPairs
from hft_megatron.data.chat import ChatError, ChatTemplate
from hft_megatron.data.examples import RECORDS_PER_BATCH, completion_pieces
from hft_megatron.data.faults import Faults, RecordRefused
from hft_megatron.data.files.digests import file_digest
from hft_megatron.data.files.sources import SourceFiles
from hft_megatron.data.fitting import NO_LIMIT, ExampleRules, count_keys, notes_of_keys
from hft_megatron.data.formats.record import Completion, Message, Preference, PromptForm
from hft_megatron.data.loss_rule import LossRule
from hft_megatron.data.order import Order, SourceMix
from hft_megatron.data.pair_checks import BadPair, check_halves, check_length, check_record, check_room
from hft_megatron.data.record_use import RecordUse
from hft_megatron.data.records import RecordReader
from hft_megatron.data.sft import SftDataset, data_digest
from hft_megatron.data.stores import Encoded, ExamplesInMemory
from hft_megatron.data.tokenizer import Piece, Tokenizer
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """The pairs of one source: a range of the data set's."""

    path: str
    weight: float | None
    pairs: int
    read: int
    truncated: int
    """Pairs of which an answer was cut off."""
    dropped: int
    """Pairs that are too long."""
    bad: tuple[tuple[str, int], ...]
    """Why pairs were left out under --dpo-bad-pairs skip, and how many, the most first."""
    notes: tuple[str, ...]
    """Lines about keys that nothing is made of."""
    forms: Mapping[PromptForm, int]
    """Kept pairs by where their prompt was."""
    use: RecordUse

    def summary(self) -> str:
        """One line for the log, with everything that was shortened or left out, and where prompts were."""
        bad = "".join(f", {count} left out: {reason}" for reason, count in self.bad)
        moved = "".join(f", {self.forms[form]} {words}" for form, words in _FORMS.items() if self.forms.get(form))
        return (
            f"{self.path}: {self.pairs} pairs of {self.read} records, {self.truncated} truncated and {self.dropped} "
            f"dropped{bad}{moved}{self.use.words()}"
        )


_FORMS: dict[PromptForm, str] = {
    "stripped": "with a prompt that both answers repeated, where it was taken off",
    "found": "with what both answers begin with as their prompt",
    "in one answer": "with a prompt that one answer alone repeats, which was left as it is",
}
"""What stands behind their number in the summary; nothing is done to others."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PairDataset:
    """All pairs of a run, source after source. Answers 2i and 2i + 1 are those of pair i, the chosen one first."""

    sources: tuple[PairSource, ...]
    answers: SftDataset

    def __len__(self) -> int:
        return len(self.answers) // 2

    @property
    def digest(self) -> str:
        """Equal digests mean equal pairs in equal order."""
        return self.answers.digest

    @property
    def seq_length(self) -> int:
        """Longest prompt and answer, in positions."""
        return self.answers.seq_length

    def num_positions(self, pair: int) -> int:
        """Positions of both halves together."""
        return self.answers.num_positions(2 * pair) + self.answers.num_positions(2 * pair + 1)

    @property
    def mix(self) -> SourceMix:
        """How the sources are mixed."""
        return SourceMix(
            sizes=tuple(source.pairs for source in self.sources),
            weights=tuple(source.weight for source in self.sources),
        )

    def order(self, seed: int) -> Order:
        """Which pair comes when in training."""
        return self.mix.order(seed)

    def accounts(self) -> list[list[str]]:
        """Lines about each source: its pairs, what it has in an epoch where weights say so, what is not learned."""
        limit = "" if self.seq_length == NO_LIMIT else f" (sequence length {self.seq_length})"
        return [
            [f"{source.summary()}{limit}{note}", *source.notes]
            for source, note in zip(self.sources, self.mix.notes(), strict=True)
        ]

    def describe(self) -> list[str]:
        """Lines for the log."""
        return [line for account in self.accounts() for line in account]


def load_pair_dataset(
    sources: Sequence[SourceFiles], tokenizer: Tokenizer, rules: ExampleRules, bad_pairs: BadPairs
) -> PairDataset:
    """Read and tokenize all sources. Needs no model and no process group.

    Raises UserError with every kind of fault that records have, and the places of two: malformed, not to be rendered,
    too long under ``error`` or, unless ``bad_pairs`` are skipped, nothing to learn (equal answers, an empty one, a
    prompt that leaves no room for an answer, answers to different prompts). Also for a source without pairs or with too
    small a weight.
    """
    assert rules.long_examples != "split"
    faults = Faults()
    kept: list[Encoded] = []
    parts = []
    for source in sources:
        if source.prefix is not None:
            raise UserError(f"{source.path} is preprocessed data, which hold no pairs; give the files of pairs.")
        answers, part = _load_source(source, tokenizer, rules, bad_pairs, faults)
        kept += answers
        parts.append(part)
    faults.raise_if_any()
    store = ExamplesInMemory(
        tokens=np.concatenate([ids for ids, _ in kept]),
        trained=np.concatenate([mask for _, mask in kept]),
        offsets=np.concatenate([[0], np.cumsum([len(ids) for ids, _ in kept])]).astype(np.int64),
    )
    origins = [{"weight": one.weight, "files": [file_digest(file) for file in one.files]} for one in sources]
    # Before prompts were taken off, the same files made other pairs, of which checkpoints and caches may be.
    cut = ("cut",) if any(part.forms.get("stripped") for part in parts) else ()
    digest = data_digest(origins, tokenizer, rules, bad_pairs, *cut)
    dataset = PairDataset(
        sources=tuple(parts),
        answers=SftDataset(parts=(), stores=(store,), seq_length=rules.seq_length, digest=digest),
    )
    for part, share in zip(parts, dataset.mix.shares or (1,) * len(parts), strict=True):
        if share == 0:
            raise UserError(
                f"the weight {part.weight:g} of {part.path} gives it no pair in an epoch of {len(dataset)}; raise it, "
                f"or leave the source out."
            )
    return dataset


def _load_source(
    source: SourceFiles, tokenizer: Tokenizer, rules: ExampleRules, bad_pairs: BadPairs, faults: Faults
) -> tuple[list[Encoded], PairSource]:
    kept: list[Encoded] = []
    bad: Counter[str] = Counter()
    forms: Counter[PromptForm] = Counter()
    read = truncated = dropped = 0
    unread: dict[str, int] = {}
    ignored: dict[str, int] = {}
    reader, faults_before = RecordReader(replace(rules.records, data_format="preference")), len(faults)
    for pair, halves in _encoded_pairs(source, reader, tokenizer, rules.loss, faults):
        read += 1
        count_keys(unread, pair.keys.unread)
        count_keys(ignored, pair.keys.ignored)
        longest = max(len(ids) - 1 for ids, _ in halves)
        try:
            check_record(pair)
            if longest > rules.seq_length and rules.long_examples == "drop":
                dropped += 1
                continue
            check_room(halves, rules)
            check_length(longest, pair.place, rules)
            fitting = [(ids[: rules.seq_length + 1], mask[: rules.seq_length + 1]) for ids, mask in halves]
            check_halves(fitting)
        except BadPair as fault:
            if bad_pairs == "error":
                sentence = f"{fault}; correct the pair, or choose --dpo-bad-pairs skip."
                faults.add(pair.place, RecordRefused(pair.place, sentence))
            else:
                bad[str(fault)] += 1
            continue
        except RecordRefused as refused:
            faults.add(pair.place, refused)
            continue
        truncated += longest > rules.seq_length
        kept += fitting
        forms[pair.form] += 1
    if not kept and len(faults) == faults_before:
        left_out = dropped + bad.total()
        why = f"all {left_out} were left out" if left_out else "it is empty"
        raise UserError(f"the data file {source.path} holds no pair to train on: {why}.")
    return kept, PairSource(
        path=source.path,
        weight=source.weight,
        pairs=len(kept) // 2,
        read=read,
        truncated=truncated,
        dropped=dropped,
        bad=tuple(bad.most_common()),
        notes=tuple(notes_of_keys(source.path, unread, ignored)),
        forms=forms,
        use=reader.use(),
    )


def _encoded_pairs(
    source: SourceFiles, reader: RecordReader, tokenizer: Tokenizer, loss: LossRule, faults: Faults
) -> Iterator[tuple[Preference, tuple[Encoded, Encoded]]]:
    template = ChatTemplate(tokenizer.facts, loss)
    records = reader.read(source.files, faults)
    while batch := [record for _, record in islice(records, RECORDS_PER_BATCH)]:
        pairs: list[Preference] = []
        pieces: list[list[Piece]] = []
        for pair in batch:
            assert isinstance(pair, Preference)
            try:
                pieces += [_pieces(pair, answer, tokenizer, template, loss) for answer in (pair.chosen, pair.rejected)]
                pairs.append(pair)
            except UserError as error:
                faults.add(pair.place, error)
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
