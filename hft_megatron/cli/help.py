"""Text of ``--help`` and ``--help-all`` of a command: options with descriptions, bounds and defaults, in groups.

argparse lays the text out, for the width of the terminal; nothing is parsed with it.
"""

import argparse
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import Any

from hft_megatron.config.flags import Flag, flags_of

HELP_WORDS = ("-h", "--help")
HELP_ALL = "--help-all"

_INDENT = 8
"""Columns before the description of an option, below its name."""
_WIDEST = 50
"""Columns of the choices behind an option's name at most: argparse doesn't wrap them."""


class _Layout(argparse.HelpFormatter):
    """Layout that never breaks a word, so that names of options stay whole."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.indent("\n".join(self._split_lines(text, width - len(indent))), indent)


def help_text(
    options_type: type, *, prog: str, description: str, first: Sequence[str] = (), everything: bool = False
) -> str:
    """Help of a command with the options named in ``first``, or with ``everything``, as if none were named."""
    flags = flags_of(options_type)
    shown = [name for name in flags if everything or not first or name in first]
    groups = dict.fromkeys(flags[name].group for name in (*filter(flags.get, first), *shown))
    rest = f"These are the options to begin with; `{prog} {HELP_ALL}` shows all {len(flags)}."
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s OPTIONS",
        description=description,
        epilog=rest if len(shown) < len(flags) else None,
        formatter_class=partial(_Layout, max_help_position=_INDENT),
        add_help=False,
    )
    for group in groups:
        members = [flags[name] for name in shown if flags[name].group == group]
        section = parser.add_argument_group(*_heading(members[0]))
        for flag in members:
            section.add_argument(f"--{flag.name}", help=_words(flag), **_form(flag))
    return parser.format_help().rstrip()


def _heading(flag: Flag) -> tuple[str, str | None]:
    """Title and description of an option's group; the options beside the groups have no description."""
    if flag.group is None:
        return "options", None
    return f"{flag.group} options", (flag.owner.__doc__ or "").partition("\n\n")[0]


def _words(flag: Flag) -> str:
    facts = flag.option.facts if _shows_choices(flag) else (flag.expected, *flag.option.facts)
    # To argparse % begins a name.
    return f"{flag.words} ({'; '.join(facts)})".strip().replace("%", "%%")


def _form(flag: Flag) -> dict[str, Any]:
    """Arguments of argparse for an option and its values."""
    if flag.is_switch:
        return {"action": argparse.BooleanOptionalAction, "default": argparse.SUPPRESS}
    placeholder = flag.placeholder if _shows_choices(flag) else "NAME"
    return {"metavar": placeholder, "nargs": "+" if flag.takes_several else None}


def _shows_choices(flag: Flag) -> bool:
    """Whether the choices, if any, fit behind the name; the description lists them otherwise."""
    return len(flag.placeholder) <= _WIDEST
