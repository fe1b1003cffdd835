"""Finds added tokens in a text as the tokenizers library does, for encoders that know nothing of them."""

import re
from collections.abc import Mapping

from tokenizers import AddedToken

_SPACE = r"[^\S\x1c-\x1f]*"
"""White space as the library has it: Python counts four separators among it."""
_BEFORE, _BEHIND = re.compile(rf"{_SPACE}\Z"), re.compile(_SPACE)


class AddedTokens:
    """Tokens by id that a text has where it holds their names, with the white space that belongs to them."""

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        self._ids = {token.content: number for number, token in tokens.items()}
        self._tokens = {token.content: token for token in tokens.values()}
        names = sorted(self._ids, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names))) if names else None

    def cut(self, text: str) -> list[str | int]:
        """The text in order: ids of tokens, and what stands between them, never empty."""
        parts: list[str | int] = []
        position = 0
        for found in self._names.finditer(text) if self._names else ():
            token = self._tokens[found[0]]
            start, end = found.span()
            if token.single_word and (re.match(r"\w", text[start - 1 : start]) or re.match(r"\w", text[end : end + 1])):
                continue
            if token.lstrip and (space := _BEFORE.search(text, position, start)):
                start = space.start()
            if token.rstrip and (space := _BEHIND.match(text, end)):
                end = space.end()
            parts += [text[position:start]] if start > position else []
            parts.append(self._ids[found[0]])
            position = end
        return parts + ([text[position:]] if position < len(text) else [])
