"""``hft-megatron flags``: all options of a run, Megatron-LM's flags and other trainers' names, with their meaning here.

Run: ``hft-megatron flags | grep moe``. ``hft-megatron flags --format markdown > docs/flags.md`` writes the page.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from hft_megatron.cli.boundary import StatusFolder, show
from hft_megatron.cli.continual import ContinualOptions
from hft_megatron.cli.training_command import options_of
from hft_megatron.config.flags import Flag, flags_of
from hft_megatron.config.megatron_flags import MEGATRON_DEFAULTS, SECTIONS, VALUES_NOT_HAD
from hft_megatron.config.megatron_rows import Row
from hft_megatron.config.run import RunConfig
from hft_megatron.methods.registry import DECLARED

_STATE_WIDTH = len("not built yet")
_ABOUT = """# Flags

Every option of `hft-megatron sft`, `dpo`, `pretrain` and `continual`, with its bounds and its default. Options that not
all of the first three have name their commands. Below them are the flags of Megatron-LM, by the parser of its
core_r0.16 and later, and names of transformers, TRL, LLaMA-Factory and ms-swift: what each of them is here.
`hft-megatron flags` prints the same as text. This page is written by
`hft-megatron flags --format markdown > docs/flags.md`.

- *option*: it is an option here.
- *accepted*: it has no effect here, because the same happens without it or does not apply; one line at the start of the
  log names all of them. Where values are listed, any other is refused.
- *other name*: it sets the option that is named.
- *not built yet* and *refused*: it is not supported under this name. All such flags of a command are listed at once,
  with exit code 2, and nothing is trained. Where an option has the same meaning, the error names it with its value
  here; VALUE stands for the given value.
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
    """Every option of the commands that train, then every other flag."""
    commands = {name: flags_of(options_of(method)) for name, method in DECLARED.items()}
    commands["continual"] = flags_of(ContinualOptions)
    options = flags_of(RunConfig)
    for of_command in commands.values():
        options |= {name: flag for name, flag in of_command.items() if name not in options}
    for name, flag in options.items():
        having = [command for command, of_command in commands.items() if name in of_command]
        few = [] if DECLARED.keys() <= set(having) else [f"only in {', '.join(having)}"]
        words = " ".join(filter(None, (flag.words, f"({'; '.join([*_facts(flag), *few])})", *_limits(name))))
        group = flag.group or "the command line alone"
        yield ShownFlag(section=f"Options: {group}", flag=f"--{name}", state="option", words=words)
    for section in SECTIONS:
        for row in section.rows:
            yield ShownFlag(section=section.title, flag=f"--{row.name}", state=row.state, words=_words_of_row(row))


def _words_of_row(row: Row) -> str:
    if row.state == "other name":
        return f"--{row.words}"
    agreeing = f"{' or '.join(row.values)} alone is accepted" if row.values else ""
    return "; ".join(filter(None, (agreeing, row.words)))


def _facts(flag: Flag) -> list[str]:
    """Choices or bounds, and the defaults."""
    facts = [flag.expected] if flag.option.choices else []
    facts += flag.option.facts
    if flag.name in MEGATRON_DEFAULTS:
        facts[-1] += f", Megatron-LM's {MEGATRON_DEFAULTS[flag.name]}"
    return facts


def _limits(name: str) -> Iterator[str]:
    """Sentences about values of Megatron-LM's option that are not supported."""
    for values, row in VALUES_NOT_HAD.items():
        if row.name == name:
            yield row.refusal(", ".join(values))


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
