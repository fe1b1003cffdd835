"""Preference pairs as tokens: for every pair the prompt with the chosen answer, and the prompt with the rejected one.

Only the answers' tokens are trained, also where the prompt holds turns of the assistant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from hft_megatron.config.dpo import BadPairs
from hft_megatron.config.file_digest import file_digest
from hft_megatron.data.dataset import ExampleStore, NamedSource, SftDataset, asked_of, data_digest, named_members
from hft_megatron.data.examples import NO_LIMIT, ExampleRules
from hft_megatron.data.files.sources import SourceFiles
from hft_megatron.data.formats.preference import PromptForm
from hft_megatron.data.order import Order, SourceMix
from hft_megatron.data.pair_reading import tokenize_pairs
from hft_megatron.data.record_errors import RecordUse, notes_of_keys, notes_of_token_names
from hft_megatron.data.token_cache import NO_CACHE, TokenCache, named
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """The pairs of one source: a range of the data set's."""

    path: str
    weight: float | None
    files: tuple[str, ...]
    pairs: int
    read: int
    truncated: int
    """Pairs whose answer was truncated."""
    dropped: int
    """Pairs that are too long."""
    bad: tuple[tuple[str, int], ...]
    """Reasons why pairs were left out under --dpo-bad-pairs skip, with numbers, the most frequent first."""
    conversations: int
    """Records that the chat template rendered."""
    notes: tuple[str, ...]
    """Lines about names of special tokens in texts, and about keys that are not read."""
    forms: Mapping[PromptForm, int]
    """Kept pairs by the place of their prompt."""
    use: RecordUse

    def summary(self) -> str:
        """One line for the log, with everything that was shortened or left out, and the places of prompts."""
        bad = "".join(f", {count} left out: {reason}" for reason, count in self.bad)
        moved = "".join(f", {self.forms[form]} {words}" for form, words in _FORMS.items() if self.forms.get(form))
        return (
            f"{self.path}: {self.pairs} pairs of {self.read} records, {self.truncated} truncated and {self.dropped} "
            f"dropped{bad}{moved}{self.use.words()}"
        )


_FORMS: dict[PromptForm, str] = {
    "stripped": "with a prompt that both answers repeated, where it was removed",
    "found": "with the common beginning of both answers as their prompt",
    "in one answer": "with a prompt that only one answer repeats, which was left as it is",
    "in both answers": "with a prompt of a few words that both answers begin with, which were left as they are",
}
"""Words after the number of each form in the summary; other forms are left out."""


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
    def uses(self) -> list[RecordUse]:
        """The record rules that had an effect, by source."""
        return [source.use for source in self.sources]

    @property
    def uses_chat_template(self) -> bool:
        """True if the chat template has rendered any of them."""
        return any(source.conversations > 0 for source in self.sources)

    @property
    def seq_length(self) -> int:
        """Length of the longest prompt and answer, in positions."""
        return self.answers.seq_length

    def num_positions(self, pair: int) -> int:
        """Positions of both halves together."""
        return self.answers.num_positions(2 * pair) + self.answers.num_positions(2 * pair + 1)

    def names(self, members: Sequence[int]) -> str:
        """``a.jsonl:17, a.jsonl:3``."""
        [store] = self.answers.stores
        starts = accumulate((source.pairs for source in self.sources), initial=0)
        sources = [
            NamedSource(
                path=source.path,
                files=source.files,
                members=source.pairs,
                place=partial(_place, store, start),
            )
            for source, start in zip(self.sources, starts, strict=False)
        ]
        return named_members("pair", members, sources)

    @property
    def mix(self) -> SourceMix:
        """The mix of the sources."""
        return SourceMix(
            sizes=tuple(source.pairs for source in self.sources),
            weights=tuple(source.weight for source in self.sources),
        )

    def order(self, seed: int) -> Order:
        """The order of the pairs in training."""
        return self.mix.order(seed)

    def accounts(self) -> list[list[str]]:
        """Lines about each source: its pairs, samples per epoch if it has a weight, and what is not learned."""
        limit = "" if self.seq_length == NO_LIMIT else f" (sequence length {self.seq_length})"
        return [
            [f"{source.summary()}{limit}{note}", *source.notes]
            for source, note in zip(self.sources, self.mix.notes(), strict=True)
        ]

    def describe(self) -> list[str]:
        """Lines for the log."""
        return [*(line for account in self.accounts() for line in account), *filter(None, [self.answers.note])]


def load_pair_dataset(
    sources: Sequence[SourceFiles],
    tokenizer: Tokenizer,
    rules: ExampleRules,
    bad_pairs: BadPairs,
    cache: TokenCache = NO_CACHE,
) -> PairDataset:
    """Read and tokenize all sources, or map another process's result from ``cache``.

    Needs no model and no process group. Raises UserError with every kind of error in records, and the places of two:
    malformed, refused by the template, too long under ``error`` or, unless ``bad_pairs`` are skipped, nothing to learn
    (equal answers, an empty one, a prompt that leaves no room for an answer, answers to different prompts). Also for a
    source without pairs or with too small a weight.
    """
    assert rules.long_examples != "split"
    for source in sources:
        if source.prefix is not None:
            raise UserError(f"{source.path} is preprocessed data, which holds no pairs; give the files of pairs.")
    digests = [[file_digest(file) for file in source.files] for source in sources]
    files = [named(*each) for each in zip(sources, digests, strict=True)]
    decisive = ["pairs", bad_pairs, files, *asked_of(tokenizer, rules)]
    found = cache.tokenized(decisive, lambda: tokenize_pairs(sources, tokenizer, rules, bad_pairs))
    parts = [_part(*each) for each in zip(sources, found.account["sources"], strict=True)]
    origins = [{"weight": each.weight, "files": files} for each, files in zip(sources, digests, strict=True)]
    digest = data_digest(origins, tokenizer, rules, bad_pairs)
    dataset = PairDataset(
        sources=tuple(parts),
        answers=SftDataset(
            parts=(), stores=(found.store,), seq_length=rules.seq_length, digest=digest, note=found.note
        ),
    )
    for part, share in zip(parts, dataset.mix.shares or (1,) * len(parts), strict=True):
        if share == 0:
            raise UserError(
                f"the weight {part.weight:g} of {part.path} gives it no pair in an epoch of {len(dataset)}; raise it, "
                f"or leave the source out."
            )
    return dataset


def _place(store: ExampleStore, start: int, pair: int) -> str:
    return store.place(2 * (start + pair))


def _part(source: SourceFiles, account: Mapping[str, Any]) -> PairSource:
    return PairSource(
        path=source.path,
        weight=source.weight,
        files=tuple(map(str, source.files)),
        notes=(
            *notes_of_token_names(source.path, account["token_names"]),
            *notes_of_keys(source.path, account["unread"], account["ignored"]),
        ),
        use=RecordUse.from_dict(account["use"]),
        bad=tuple((reason, count) for reason, count in account["bad"]),
        **{name: account[name] for name in ("pairs", "read", "truncated", "dropped", "conversations", "forms")},
    )
