"""``hft-megatron flags``: Megatron-LM's training flags, as options here, accepted without effect, or not supported.

Run: ``hft-megatron flags | grep moe``. ``hft-megatron flags --format markdown > docs/flags.md`` writes the page.
"""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_type_hints

from hft_megatron.cli.boundary import StatusFolder, show
from hft_megatron.config.flags import flags_of
from hft_megatron.config.megatron_flags import MEGATRON_DEFAULTS, SECTIONS, VALUES_NOT_HAD
from hft_megatron.config.megatron_rows import Row
from hft_megatron.config.run import RunConfig

_STATE_WIDTH = len("not built yet")
_ABOUT = """# Megatron-LM's flags

Flags of a Megatron-LM script and their treatment by `hft-megatron sft`, `pretrain` and `dpo`, by Megatron-LM's parser
of core_r0.16 and later; `hft-megatron flags` prints the same as text. This page is written by
`hft-megatron flags --format markdown > docs/flags.md`.

- *option*: it is an option here.
- *accepted*: it has no effect here, because the same happens without it or does not apply; one line at the start of the
  log names all of them. Where values are listed, any other is refused.
- *other name*: it sets the option that is named.
- *not built yet* and *refused*: it is not supported. All such flags of a command are listed at once, with exit code 2,
  and nothing is trained.
"""


@dataclass(frozen=True, kw_only=True)
class FlagsOptions:
    """Options of ``hft-megatron flags``."""

    format: Literal["text", "json", "markdown"] = "text"
    """Format of the output: text for reading and grep, json for a list of objects, markdown for the documentation."""


@dataclass(frozen=True, kw_only=True)
class ShownFlag:
    """A line of the table."""

    section: str
    flag: str
    """Name with its leading dashes."""
    state: str
    words: str


def run(options: FlagsOptions, status: StatusFolder) -> None:
    """Print the table."""
    shown = list(shown_flags())
    if options.format == "json":
        show(json.dumps([asdict(flag) for flag in shown], indent=1))
    else:
        show(_page(shown) if options.format == "markdown" else _text(shown))


def shown_flags() -> Iterator[ShownFlag]:
    """Every option of a run, then every other flag."""
    for group in fields(RunConfig):
        options = get_type_hints(RunConfig)[group.name]
        words = _words_of_fields(options)
        for name in flags_of(options):
            field = name.replace("-", "_")
            about = [words.get(field, ""), _default(name, getattr(options(), field)), *_limits(name)]
            yield ShownFlag(
                section=f"Options: {group.name}", flag=f"--{name}", state="option", words=" ".join(filter(None, about))
            )
    for section in SECTIONS:
        for row in section.rows:
            yield ShownFlag(section=section.title, flag=f"--{row.name}", state=row.state, words=_words_of_row(row))


def _words_of_row(row: Row) -> str:
    if row.state == "other name":
        return f"--{row.words}"
    agreeing = f"{' or '.join(row.values)} alone is accepted" if row.values else ""
    return "; ".join(filter(None, (agreeing, row.words)))


def _default(name: str, value: Any) -> str:
    """The defaults here and in Megatron-LM, where there are any."""
    here = "" if value is None or value == () else f"default {_shown(value)}"
    there = f"Megatron-LM's {MEGATRON_DEFAULTS[name]}" if name in MEGATRON_DEFAULTS else ""
    both = ", ".join(filter(None, (here, there)))
    return both and f"({both})"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) or "empty"


def _limits(name: str) -> Iterator[str]:
    """Sentences about values of Megatron-LM's option that are not supported."""
    for values, row in VALUES_NOT_HAD.items():
        if row.name == name:
            yield row.refusal(", ".join(values))


def _words_of_fields(options: type) -> dict[str, str]:
    """The text below each field of a dataclass, as one line."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(options))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def _text(shown: list[ShownFlag]) -> str:
    lines = []
    for title, flags in _by_section(shown):
        width = max(len(flag.flag) for flag in flags)
        lines += ["", title]
        lines += [f"  {flag.flag:<{width}}  {flag.state:<{_STATE_WIDTH}}  {flag.words}".rstrip() for flag in flags]
    return "\n".join(lines[1:])


def _page(shown: list[ShownFlag]) -> str:
    lines = [_ABOUT.rstrip()]
    for title, flags in _by_section(shown):
        lines += ["", f"## {title}", ""]
        if len(flags) > 1 and len({(flag.state, flag.words) for flag in flags}) == 1:
            lines += [f"{flags[0].state.capitalize()}: {flags[0].words}.", ""]
            lines.append(", ".join(f"`{flag.flag}`" for flag in flags))
        else:
            lines += ["| flag | state | words |", "|---|---|---|"]
            lines += [f"| `{flag.flag}` | {flag.state} | {flag.words.replace('|', chr(92) + '|')} |" for flag in flags]
    return "\n".join(lines)


def _by_section(shown: list[ShownFlag]) -> Iterator[tuple[str, list[ShownFlag]]]:
    for title in dict.fromkeys(flag.section for flag in shown):
        yield title, [flag for flag in shown if flag.section == title]
