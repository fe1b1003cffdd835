"""``hft-megatron show-data --html``: one page that needs nothing else and runs nothing."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from hft_megatron.cli.show_data_text import with_line_ends
from hft_megatron.data.shown_examples import ShownExample, ShownSource
from hft_megatron.data.visible_tokens import VisibleToken

FIRST_LINE = "<!doctype html><!-- hft-megatron show-data -->"
"""How a page of ours is known again, so that only such a one is written over."""
STYLE = """\
body { font-family: sans-serif; margin: 2em; max-width: 60em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; border: 1px solid #ccc; padding: 0.6em; }
span { unicode-bidi: isolate; padding: 0 1px; background: #eee; color: #333; }
span:nth-child(even) { background: #ddd; }
.t { background: #9be29b; color: #000; }
.t:nth-child(even) { background: #c4f0c4; }
.s { font-weight: bold; }
"""


def is_data_page(path: Path) -> bool:
    """Whether ``path`` may be written: it holds nothing, or a page of this command."""
    try:
        with path.open("rb") as file:
            return file.readline().rstrip() in (b"", FIRST_LINE.encode())
    except FileNotFoundError:
        return True
    except OSError:
        return False


def data_page(sources: Sequence[ShownSource], notes: Sequence[str] = ()) -> str:
    """The page, with notes about the tokenizer first. Pointing at a token shows its id."""
    return "\n".join([*_lines(sources, notes), ""])


def _lines(sources: Sequence[ShownSource], notes: Sequence[str]) -> Iterator[str]:
    yield FIRST_LINE
    yield '<html lang="en"><head><meta charset="utf-8"><title>What is trained</title>'
    yield f"<style>\n{STYLE}</style></head><body>"
    yield '<p><span class="t">trained</span> <span>not trained</span> <span class="s">special token</span></p>'
    yield from (f"<p>{escape(note)}</p>" for note in notes)
    for source in sources:
        title, *lines = source.account
        yield f"<h2>{escape(title)}</h2>"
        yield from (f"<p>{escape(line)}</p>" for line in lines)
        for example in source.examples:
            yield from _example(example)
    yield "</body></html>"


def _example(example: ShownExample) -> Iterator[str]:
    yield f"<h3>{escape(example.title)}</h3>"
    yield f"<pre>{''.join(map(_token, example.tokens))}</pre>"


def _token(token: VisibleToken) -> str:
    names = " ".join(name for name, holds in (("t", token.trained), ("s", token.special)) if holds)
    kind = f' class="{names}"' if names else ""
    ids = " ".join(map(str, token.ids))
    return f'<span{kind} title="{ids}">{escape(with_line_ends(token.text))}</span>'
