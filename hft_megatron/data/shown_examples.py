"""The first examples of a data set, for a person to look at."""

from dataclasses import dataclass

from hft_megatron.data.sft import SftDataset
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.visible_tokens import VisibleToken, visible_tokens


@dataclass(frozen=True, kw_only=True)
class ShownExample:
    """One example, whole."""

    number: int
    """From 1, within its source, of those that are kept."""
    tokens: tuple[VisibleToken, ...]

    @property
    def title(self) -> str:
        """Number and counts."""
        count = sum(len(token.ids) for token in self.tokens)
        trained = sum(len(token.ids) for token in self.tokens if token.trained)
        return f"example {self.number}: {count} tokens, {trained} trained"


@dataclass(frozen=True, kw_only=True)
class ShownSource:
    """One source's counts, and its first examples."""

    description: str
    examples: tuple[ShownExample, ...]


def shown_sources(dataset: SftDataset, tokenizer: Tokenizer, examples: int) -> list[ShownSource]:
    """Every source of ``dataset`` with its first ``examples``."""
    shown, start = [], 0
    for part, description in zip(dataset.parts, dataset.describe(), strict=True):
        found = tuple(
            ShownExample(number=number + 1, tokens=tuple(visible_tokens(tokenizer, *dataset.example(start + number))))
            for number in range(min(examples, part.examples))
        )
        shown.append(ShownSource(description=description, examples=found))
        start += part.examples
    return shown
