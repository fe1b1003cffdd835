"""Rules that take the answer out of a generated text, by name. What a rule doesn't find is the empty text."""

import difflib
import re
from collections.abc import Callable

from hft_megatron.errors import UserError

Extractor = Callable[[str], str]

RULES: dict[str, Extractor] = {}
"""By name; a rule's docstring says what it finds, for people."""

REGEX = "regex:"
"""Before a pattern of the user's."""


def rule(extract: Extractor) -> Extractor:
    """Adds a rule under the name of the function."""
    RULES[extract.__name__] = extract
    return extract


def extractor(name: str) -> Extractor:
    """The rule of ``RULES`` with that name, or of ``regex:PATTERN``: of the first place that matches (by re.search)
    the first group, or all of it where the pattern has no groups.

    For the last place let the pattern begin with ``(?s:.*)``. A text is cut where a word begins with
    ``regex:(?s)(.*?)(?:WORD|\\Z)``. Raises UserError for another name or a pattern that re doesn't compile.
    """
    if not name.startswith(REGEX):
        if name not in RULES:
            nearest = difflib.get_close_matches(name, RULES, n=1, cutoff=0)[0]
            names = ", ".join([*RULES, f"{REGEX}PATTERN"])
            raise UserError(f"extract: {name} is no rule; the nearest of {names} is {nearest}.")
        return RULES[name]
    written = name.removeprefix(REGEX)
    try:
        pattern = re.compile(written)
    except re.error as error:
        raise UserError(f"extract: {name} is no regular expression of Python's ({error}); correct it.") from error
    if not written:
        raise UserError(f"extract: {REGEX} needs a pattern behind it, such as {REGEX}answer is (.*).")
    return lambda text: _found(pattern, text)


def _found(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return "" if match is None else match[1 if pattern.groups else 0] or ""


@rule
def whole(text: str) -> str:
    """The text as it is."""
    return text


@rule
def stripped(text: str) -> str:
    """The text without white space at its ends."""
    return text.strip()


@rule
def first_line(text: str) -> str:
    """What stands before the first line break, also if that is nothing."""
    return text.partition("\n")[0]


@rule
def first_token(text: str) -> str:
    """The first word: words are parted by white space."""
    return text.split(maxsplit=1)[0] if text.strip() else ""


# Chinese has no spaces: only Latin letters and digits make a letter part of a word, also over an apostrophe ("I'm").
_LATIN = "0-9A-Za-z\u00c0-\u024f"
_LETTER = re.compile(f"(?<![{_LATIN}])(?<![{_LATIN}]['\u2019])[A-Z](?!['\u2019]?[{_LATIN}])")


@rule
def first_letter(text: str) -> str:
    """The first of A to Z that stands alone, for multiple choice: ``B`` of ``The answer is (B).`` The words A and I are
    letters too."""
    return _found(_LETTER, text)


# A minus is the sign of a number unless something stands before it that it is subtracted from.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-\u2212])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
)


@rule
def last_number(text: str) -> str:
    """The last number, for GSM8K: ``-1234.5`` of ``= $-1,234.50.`` Equal numbers are equal texts: without commas, zeros
    at the end of decimals, and zeros before the first digit."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return ""
    number = str(numbers[-1]).replace(",", "")
    whole_part, _, decimals = number.lstrip("-\u2212").partition(".")
    size = f"{whole_part.lstrip('0') or '0'}.{decimals}".rstrip("0").rstrip(".")
    return f"-{size}" if number[0] in "-\u2212" and size != "0" else size


@rule
def final_answer(text: str) -> str:
    """The number behind the first ``####`` and a space, without commas, as GSM8K's own program reads it."""
    return _found(_FINAL, text).replace(",", "")


_FINAL = re.compile(r"#### (-?[0-9.,]+)")
_BOXED = re.compile(r"\\boxed\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


@rule
def boxed(text: str) -> str:
    r"""What the last ``\boxed{...}`` of LaTeX holds, with the braces in it; nothing where it isn't closed."""
    start = max((match.end() for match in _BOXED.finditer(text)), default=len(text))
    depth = 1
    for match in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : match.start()]
    return ""
