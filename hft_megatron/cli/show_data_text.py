"""``hft-megatron show-data`` on a terminal, or as plain text where there is none."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from hft_megatron.data.shown_examples import ShownSource
from hft_megatron.data.visible_tokens import VisibleToken

MARKS = ("{+", "+}")
"""Around what is trained, where there are no colours."""
TRAINED_SHADES = ("\x1b[30;48;5;114m", "\x1b[30;48;5;157m")
RESTING_SHADES = ("\x1b[38;5;250;48;5;236m", "\x1b[38;5;250;48;5;239m")
"""Two of each in turn, so that neighbouring tokens are told apart."""
RESET = "\x1b[0m"


def data_text(sources: Sequence[ShownSource], notes: Sequence[str] = (), *, colours: bool) -> str:
    """Notes about the tokenizer, counts and examples. A line end within an example is also shown as ↵."""
    legend = f"{TRAINED_SHADES[0]}trained{RESET} {RESTING_SHADES[0]}not trained{RESET}"
    lines = [legend if colours else f"{MARKS[0]}trained{MARKS[1]}"]
    lines += [line for note in notes for line in ("", note)]
    for source in sources:
        lines += ["", *source.account]
        for example in source.examples:
            lines += ["", example.title, "".join(_coloured(example.tokens) if colours else _marked(example.tokens))]
    return "\n".join(lines)


def _coloured(tokens: Sequence[VisibleToken]) -> Iterator[str]:
    for number, token in enumerate(tokens):
        shade = (TRAINED_SHADES if token.trained else RESTING_SHADES)[number % 2]
        # A colour that is on at a line end would fill the rest of the line.
        yield "\n".join(f"{shade}{line}{RESET}" if line else "" for line in with_line_ends(token.text).split("\n"))


def _marked(tokens: Sequence[VisibleToken]) -> Iterator[str]:
    for trained, run in groupby(tokens, key=lambda token: token.trained):
        text = with_line_ends("".join(token.text for token in run))
        yield f"{MARKS[0]}{text}{MARKS[1]}" if trained else text


def with_line_ends(text: str) -> str:
    """The text with its line ends visible."""
    return text.replace("\n", "↵\n")
