"""Control tokens: how they are told from text that only looks like them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ESCAPE = "\ufdd2"
"""Unicode keeps this noncharacter for programs' own use; no text may contain it, and no trim filter removes it."""


@dataclass(frozen=True, kw_only=True)
class SpecialToken:
    """A control token that only a template may produce."""

    content: str
    id: int
    strips_left: bool = False
    """White space before it in a rendered template belongs to it (Hugging Face's ``lstrip``)."""
    strips_right: bool = False


class SpecialTokens:
    """Finds special tokens in rendered text, and hides the names of them that a person wrote."""

    def __init__(self, tokens: Sequence[SpecialToken]) -> None:
        self._names = [token.content for token in tokens]
        self._by_name = {token.content: token for token in tokens}
        self._in_text = _pattern(tokens, lambda token: re.escape(token.content))
        self.pattern = _pattern(tokens, _with_stripped_space)
        """Matches a token of the template, with the white space that belongs to it."""

    def found(self, match: re.Match[str]) -> SpecialToken:
        """The token that ``pattern`` matched."""
        return self._by_name.get(match[0]) or self._by_name[match[0].strip()]

    def name_end(self, match: re.Match[str]) -> int:
        """Where the name of the token that ``pattern`` matched ends, before the white space that belongs to it."""
        name = self.found(match).content
        return match.start() + match[0].index(name) + len(name)

    def named_in(self, *texts: str) -> bool:
        """Whether a text has the name of a token."""
        return bool(self._names) and any(self._in_text.search(text) for text in texts)

    def hide(self, value: Any) -> Any:
        """``value`` with every token's name in its texts replaced, at any depth, so that ``pattern`` doesn't match."""
        if isinstance(value, str):
            return self._in_text.sub(lambda found: f"{ESCAPE}{self._names.index(found[0])}{ESCAPE}", value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(inner) for key, inner in value.items()}
        return [self.hide(inner) for inner in value] if isinstance(value, list) else value

    def show(self, text: str) -> str:
        """The inverse of ``hide`` for a text."""
        return re.sub(f"{ESCAPE}(\\d+){ESCAPE}", lambda found: self._names[int(found[1])], text)


def _pattern(tokens: Sequence[SpecialToken], form: Callable[[SpecialToken], str]) -> re.Pattern[str]:
    """Matches any of the tokens, a longer one before its own beginning."""
    longest_first = sorted(tokens, key=lambda token: -len(token.content))
    return re.compile("|".join(form(token) for token in longest_first))


def _with_stripped_space(token: SpecialToken) -> str:
    left = r"\s*" if token.strips_left else ""
    right = r"\s*" if token.strips_right else ""
    return left + re.escape(token.content) + right
