"""``hft-megatron completion``: a script that completes commands, options, their values and files in a shell.

Run: ``source <(hft-megatron completion bash)`` in bash, the same with ``zsh`` in zsh after its compinit, or
``hft-megatron completion fish | source`` in fish; in the shell's own start-up file every session has it. The script
holds all that it offers, so that completing starts no Python.
"""

import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hft_megatron.cli.help import HELP_ALL, HELP_WORDS
from hft_megatron.config.flags import Flag

Shell = Literal["bash", "zsh", "fish"]


class Offer(NamedTuple):
    """Words that a command offers."""

    summary: str
    flags: Mapping[str, Flag]
    """Options by name."""
    bare: tuple[str, ...] = ()
    """Values that may follow the command without their option."""


Commands = Mapping[str, Offer]
"""By the names of the commands."""

_BASH = """\
# Completion of hft-megatron, as `hft-megatron completion bash` writes it.
_hft_megatron() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}} command=${{COMP_WORDS[1]}}
    local offered=''
    # In --name=value the sign is a word of its own.
    if [[ $current == '=' ]]; then
        current=''
    elif [[ $previous == '=' ]]; then
        previous=${{COMP_WORDS[COMP_CWORD - 2]}}
    fi
    if ((COMP_CWORD == 1)); then
        offered={commands}
    else
        case "$command $previous" in
{choices}
        esac
        if [[ -z $offered && ($current == -* || $COMP_CWORD -eq 2) ]]; then
            case $command in
{options}
            esac
        fi
    fi
    COMPREPLY=($(compgen -W "$offered" -- "$current"))
}}
# Where nothing is offered, files are.
complete -o default -F _hft_megatron hft-megatron
"""
_ABOUT = {HELP_WORDS[-1]: "Show the commands", "--version": "Show the installed versions"}
"""Words that stand in place of a command."""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"
"""Lets zsh run the completion of bash."""


@dataclass(frozen=True, kw_only=True)
class CompletionOptions:
    """Options of ``hft-megatron completion``."""

    shell: Shell = "bash"
    """The shell that reads the script; its name may stand alone. bash: `source <(hft-megatron completion bash)`, zsh:
    the same after compinit, fish: `hft-megatron completion fish | source`."""


def script(shell: Shell, commands: Commands) -> str:
    """Completion script of a shell."""
    if shell == "fish":
        return "\n".join(_fish(commands))
    text = _bash(commands)
    return _ZSH + text if shell == "zsh" else text


def _bash(commands: Commands) -> str:
    choices, options = defaultdict[str, list[str]](list), list[str]()
    for command, offer in commands.items():
        for flag in offer.flags.values():
            if flag.option.choices:
                choices[" ".join(map(str, flag.option.choices))].append(shlex.quote(f"{command} --{flag.name}"))
        words = " ".join([*offer.bare, *_names(offer.flags)])
        options.append(f"{' ' * 16}{command}) offered={shlex.quote(words)} ;;")
    of_values = (f"{' | '.join(of)}) offered={shlex.quote(values)} ;;" for values, of in choices.items())
    return _BASH.format(
        commands=shlex.quote(" ".join((*commands, *_ABOUT))),
        choices="\n".join(f"{' ' * 12}{case}" for case in of_values),
        options="\n".join(options),
    )


def _names(flags: Mapping[str, Flag]) -> Iterator[str]:
    """All spellings of the options: both forms of a switch."""
    yield from (HELP_WORDS[-1], HELP_ALL)
    for flag in flags.values():
        yield f"--{flag.name}"
        if flag.is_switch:
            yield f"--no-{flag.name}"


def _fish(commands: Commands) -> Iterator[str]:
    yield "# Completion of hft-megatron, as `hft-megatron completion fish` writes it."
    for name, about in _ABOUT.items():
        yield f"complete -c hft-megatron -n __fish_use_subcommand -l {name.removeprefix('--')} -d {_fish_quoted(about)}"
    for command, offer in commands.items():
        yield f"complete -c hft-megatron -n __fish_use_subcommand -f -a {command} -d {_fish_quoted(offer.summary)}"
        if offer.bare:
            condition = _fish_quoted(f"__fish_seen_subcommand_from {command}")
            yield f"complete -c hft-megatron -n {condition} -f -a {_fish_quoted(' '.join(offer.bare))}"
    having = defaultdict[tuple[str, str, str], list[str]](list)
    for command, offer in commands.items():
        for flag in offer.flags.values():
            about = _fish_quoted(flag.words.partition(". ")[0])
            for name in (flag.name, f"no-{flag.name}") if flag.is_switch else (flag.name,):
                having[name, _fish_value(flag), about].append(command)
    for name in (HELP_WORDS[-1], HELP_ALL):
        having[name.removeprefix("--"), "", _fish_quoted("Show the options")] = list(commands)
    for (name, value, about), of in having.items():
        condition = _fish_quoted(f"__fish_seen_subcommand_from {' '.join(of)}")
        yield f"complete -c hft-megatron -n {condition} -l {name} {value}-d {about}"


def _fish_value(flag: Flag) -> str:
    """Arguments of fish for the value of an option: none, its choices, or anything, with files on offer."""
    if flag.option.choices:
        return f"-x -a {_fish_quoted(' '.join(map(str, flag.option.choices)))} "
    return "" if flag.is_switch else "-r "


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
