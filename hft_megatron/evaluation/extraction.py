"""Named rules that extract the answer from a generated text. Without an answer they return the empty text."""

import difflib
import re
from collections.abc import Callable

from hft_megatron.errors import UserError

Extractor = Callable[[str], str]

RULES: dict[str, Extractor] = {}
"""Rules by name; a rule's docstring describes it for users."""

REGEX = "regex:"
"""Prefix of a user's pattern."""


def rule(extract: Extractor) -> Extractor:
    """Adds a rule under the name of the function."""
    RULES[extract.__name__] = extract
    return extract


def extractor(name: str) -> Extractor:
    """The rule of ``RULES`` with that name, or of ``regex:PATTERN``: the first group of the first match (by re.search),
    or the whole match where the pattern has no groups.

    For the last match let the pattern begin with ``(?s:.*)``. To cut a text before a word, use
    ``regex:(?s)(.*?)(?:WORD|\\Z)``. Raises UserError for another name or a pattern that re cannot compile.
    """
    if not name.startswith(REGEX):
        if name not in RULES:
            nearest = difflib.get_close_matches(name, RULES, n=1, cutoff=0)[0]
            names = ", ".join([*RULES, f"{REGEX}PATTERN"])
            raise UserError(f"extract: {name} is not a rule; the nearest of {names} is {nearest}.")
        return RULES[name]
    written = name.removeprefix(REGEX)
    try:
        pattern = re.compile(written)
    except re.error as error:
        raise UserError(f"extract: {name} is not a regular expression of Python ({error}); correct it.") from error
    if not written:
        raise UserError(f"extract: {REGEX} needs a pattern after it, such as {REGEX}answer is (.*).")
    return lambda text: _found(pattern, text)


def _found(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return "" if match is None else match[1 if pattern.groups else 0] or ""


@rule
def whole(text: str) -> str:
    """The text unchanged."""
    return text


@rule
def stripped(text: str) -> str:
    """The text without white space at its ends."""
    return text.strip()


@rule
def first_line(text: str) -> str:
    """The text before the first line break, which may be empty."""
    return text.partition("\n")[0]


@rule
def first_token(text: str) -> str:
    """The first word; words are separated by white space."""
    return text.split(maxsplit=1)[0] if text.strip() else ""


# Chinese has no spaces: only Latin letters and digits make a letter part of a word, also across an apostrophe ("I'm").
_LATIN = "0-9A-Za-z\u00c0-\u024f"
_LETTER = re.compile(f"(?<![{_LATIN}])(?<![{_LATIN}]['\u2019])[A-Z](?!['\u2019]?[{_LATIN}])")


@rule
def first_letter(text: str) -> str:
    """The first single letter from A to Z, for multiple choice: ``B`` of ``The answer is (B).`` The words A and I count
    as letters too."""
    return _found(_LETTER, text)


# A minus is the sign of a number unless it follows something that the number is subtracted from.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-\u2212])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
)


@rule
def last_number(text: str) -> str:
    """The last number, for GSM8K: ``-1234.5`` of ``= $-1,234.50.`` Equal numbers are equal texts: without commas,
    without zeros at the end of decimals, and without zeros before the first digit."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return ""
    number = str(numbers[-1]).replace(",", "")
    whole_part, _, decimals = number.lstrip("-\u2212").partition(".")
    size = f"{whole_part.lstrip('0') or '0'}.{decimals}".rstrip("0").rstrip(".")
    return f"-{size}" if number[0] in "-\u2212" and size != "0" else size


@rule
def final_answer(text: str) -> str:
    """The number after the first ``####`` and a space, without commas, as GSM8K's own program reads it."""
    return _found(_FINAL, text).replace(",", "")


_FINAL = re.compile(r"#### (-?[0-9.,]+)")
_BOXED = re.compile(r"\\boxed\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


@rule
def boxed(text: str) -> str:
    r"""The content of the last ``\boxed{...}`` of LaTeX, with inner braces; empty where it isn't closed."""
    start = max((match.end() for match in _BOXED.finditer(text)), default=len(text))
    depth = 1
    for match in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : match.start()]
    return ""
