"""Examples token by token, as text and as a page."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from hft_megatron.data.shown_examples import ShownSource, VisibleToken

MARKS = ("{+", "+}")
"""Marks around trained text, without colours."""
TRAINED_SHADES = ("\x1b[30;48;5;114m", "\x1b[30;48;5;157m")
UNTRAINED_SHADES = ("\x1b[38;5;250;48;5;236m", "\x1b[38;5;250;48;5;239m")
"""Two alternating shades of each, so that neighbouring tokens can be distinguished."""
RESET = "\x1b[0m"


def data_text(sources: Sequence[ShownSource], notes: Sequence[str] = (), *, colours: bool) -> str:
    """Notes about the tokenizer, counts and examples. A line end within an example is also shown as ↵."""
    legend = f"{TRAINED_SHADES[0]}trained{RESET} {UNTRAINED_SHADES[0]}not trained{RESET}"
    lines = [legend if colours else f"{MARKS[0]}trained{MARKS[1]}"]
    lines += [line for note in notes for line in ("", note)]
    for source in sources:
        lines += ["", *source.account]
        for example in source.examples:
            lines += ["", example.title, "".join(_coloured(example.tokens) if colours else _marked(example.tokens))]
    return "\n".join(lines)


def _coloured(tokens: Sequence[VisibleToken]) -> Iterator[str]:
    for number, token in enumerate(tokens):
        shade = (TRAINED_SHADES if token.trained else UNTRAINED_SHADES)[number % 2]
        # A colour that is still on at a line end would fill the rest of the line.
        yield "\n".join(f"{shade}{line}{RESET}" if line else "" for line in with_line_ends(token.text).split("\n"))


def _marked(tokens: Sequence[VisibleToken]) -> Iterator[str]:
    for trained, run in groupby(tokens, key=lambda token: token.trained):
        text = with_line_ends("".join(token.text for token in run))
        yield f"{MARKS[0]}{text}{MARKS[1]}" if trained else text


def with_line_ends(text: str) -> str:
    """The text with its line ends visible."""
    return text.replace("\n", "↵\n")


FIRST_LINE = "<!doctype html><!-- hft-megatron show-data -->"
"""First line by which a page of this command is recognised, so that no other file is overwritten."""
PAGE = """\
<html lang="en"><head><meta charset="utf-8"><title>Trained tokens</title>
<style>
body { font-family: sans-serif; margin: 2em; max-width: 60em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; border: 1px solid #ccc; padding: 0.6em; }
span { unicode-bidi: isolate; padding: 0 1px; background: #eee; color: #333; }
span:nth-child(even) { background: #ddd; }
.t { background: #9be29b; color: #000; }
.t:nth-child(even) { background: #c4f0c4; }
.s { font-weight: bold; }
</style></head><body>
<p><span class="t">trained</span> <span>not trained</span> <span class="s">special token</span></p>
{% for note in notes %}
<p>{{ note }}</p>
{% endfor %}
{% for source in sources %}
<h2>{{ source.account[0] }}</h2>
{% for line in source.account[1:] %}
<p>{{ line }}</p>
{% endfor %}
{% for example in source.examples %}
<h3>{{ example.title }}</h3>
<pre>
{%- for token in example.tokens -%}
<span class="{{ 't' if token.trained }} {{ 's' if token.special }}" title="{{ token.ids | join(' ') }}">
{{- token.text | with_line_ends -}}
</span>
{%- endfor -%}
</pre>
{% endfor %}
{% endfor %}
</body></html>
"""


def is_data_page(path: Path) -> bool:
    """Return whether ``path`` may be written: it is empty or missing, or a page of this command."""
    try:
        with path.open("rb") as file:
            return file.readline().rstrip() in (b"", FIRST_LINE.encode())
    except FileNotFoundError:
        return True
    except OSError:
        return False


def data_page(sources: Sequence[ShownSource], notes: Sequence[str] = ()) -> str:
    """The page, with notes about the tokenizer first. Pointing at a token shows its id."""
    environment = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    environment.filters["with_line_ends"] = with_line_ends
    body = environment.from_string(PAGE).render(sources=sources, notes=notes)
    return f"{FIRST_LINE}\n{body}"
