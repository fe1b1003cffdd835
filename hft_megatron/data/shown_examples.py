"""The first examples of a data set, for a person to look at."""

from dataclasses import dataclass

from hft_megatron.data.pairs import PairDataset
from hft_megatron.data.sft import SftDataset
from hft_megatron.data.stores import Encoded
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.visible_tokens import VisibleToken, visible_tokens


@dataclass(frozen=True, kw_only=True)
class ShownExample:
    """One example, or one answer of a pair behind its prompt, whole."""

    name: str
    """With its number, from 1, within its source, of those that are kept."""
    tokens: tuple[VisibleToken, ...]

    @property
    def title(self) -> str:
        """Number and counts."""
        count = sum(len(token.ids) for token in self.tokens)
        trained = sum(len(token.ids) for token in self.tokens if token.trained)
        return f"{self.name}: {count} tokens, {trained} trained"


@dataclass(frozen=True, kw_only=True)
class ShownSource:
    """One source's account, and its first examples."""

    account: tuple[str, ...]
    """Lines about it."""
    examples: tuple[ShownExample, ...]


def shown_sources(dataset: SftDataset, tokenizer: Tokenizer, examples: int) -> list[ShownSource]:
    """Every source of ``dataset`` with its first ``examples``."""
    shown, start = [], 0
    for part, account in zip(dataset.parts, dataset.accounts(), strict=True):
        found = tuple(
            _shown(f"example {number + 1}", dataset.example(start + number), tokenizer)
            for number in range(min(examples, part.examples))
        )
        shown.append(ShownSource(account=tuple(account), examples=found))
        start += part.examples
    return shown


def shown_pairs(dataset: PairDataset, tokenizer: Tokenizer, pairs: int) -> list[ShownSource]:
    """Every source of ``dataset`` with the two answers of its first ``pairs``, the chosen one first."""
    shown, start = [], 0
    for part, account in zip(dataset.sources, dataset.accounts(), strict=True):
        found = tuple(
            _shown(f"pair {number + 1}, {name}", dataset.answers.example(2 * (start + number) + half), tokenizer)
            for number in range(min(pairs, part.pairs))
            for half, name in enumerate(("chosen", "rejected"))
        )
        shown.append(ShownSource(account=tuple(account), examples=found))
        start += part.pairs
    return shown


def _shown(name: str, example: Encoded, tokenizer: Tokenizer) -> ShownExample:
    return ShownExample(name=name, tokens=tuple(visible_tokens(tokenizer, *example)))
