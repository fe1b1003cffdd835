"""The table of commands and the way from ``argv`` to one of them.

Run: ``hft-megatron sft --help``. Nothing heavy is imported before a command's options have been checked.
"""

import difflib
import platform
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any

import hft_megatron
from hft_megatron.cli import (
    average,
    completion,
    continual,
    convert,
    doctor,
    evaluate,
    flags,
    half_reset,
    plan,
    preprocess,
    show_data,
    ties,
)
from hft_megatron.cli.boundary import PROG, StatusFolder, note, run_command, show
from hft_megatron.cli.help import HELP_ALL, HELP_WORDS, help_text
from hft_megatron.cli.training_command import first_options, options_of, run_method
from hft_megatron.config.flags import flags_of
from hft_megatron.config.loading import load_options
from hft_megatron.errors import UserError
from hft_megatron.methods.registry import DECLARED

ABSENT = "not installed"
APEX_KERNELS = "amp_C"
"""Module of NVIDIA's Apex that distinguishes it from the `apex` on PyPI, another project."""


def version_text() -> str:
    """Versions of this package and its engine, one per line."""
    return "\n".join(f"{name} {version}" for name, version in _versions())


def _versions() -> Iterator[tuple[str, str]]:
    yield "hft-megatron", f"{hft_megatron.__version__}, Python {platform.python_version()}"
    yield "torch", _torch()
    yield "megatron-core", _installed("megatron-core")
    yield "transformer-engine", _installed("transformer-engine")
    kernels = "with" if find_spec(APEX_KERNELS) else "without"
    apex = _installed("apex")
    yield "Apex", apex if apex == ABSENT else f"{apex}, {kernels} its CUDA kernels"


def _installed(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ABSENT


def _torch() -> str:
    """Version and target of the build, read from torch's own file without importing torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return ABSENT
    facts = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    cuda = facts["cuda"]
    return f"{facts['__version__']}, {'for CPU' if cuda is None else f'for CUDA {cuda}'}"


VERSION_WORD = "--version"


@dataclass(frozen=True, kw_only=True)
class Command:
    """One word after ``hft-megatron``."""

    summary: str
    options: type
    """Frozen dataclass that its arguments are parsed into."""
    run: Callable[[Any, StatusFolder], None]
    """Takes the parsed options and the folder for the outcome."""
    note: Callable[[str], None] | None = None
    """Takes a line about the options, where the command has a log."""
    first: tuple[str, ...] = ()
    """Names of the options that --help shows, in groups that have the order of these; without any it shows all."""
    bare: str | None = None
    """Name of the option whose value may follow the command without it."""

    def arguments(self, words: Sequence[str]) -> Sequence[str]:
        """The words with the name of every option."""
        if self.bare is None or not words or words[0].startswith("-"):
            return words
        return [f"--{self.bare}", *words]

    def offer(self) -> completion.Offer:
        """Words that a shell completes after the command."""
        flags = flags_of(self.options)
        bare = () if self.bare is None else tuple(map(str, flags[self.bare].option.choices))
        return completion.Offer(self.summary, flags, bare)


def _show_completion(options: completion.CompletionOptions, status: StatusFolder) -> None:
    show(completion.script(options.shell, {name: command.offer() for name, command in commands().items()}))


COMMANDS = {
    "plan": Command(
        summary="show the units that train in each round, and their costs on every rank; needs no GPU and no weights",
        options=plan.PlanOptions,
        run=plan.run,
        first=plan.FIRST,
    ),
    "show-data": Command(
        summary="show the first examples token by token, with the trained tokens marked; needs no GPU and no weights",
        options=show_data.ShowDataOptions,
        run=show_data.run,
    ),
    "preprocess": Command(
        summary="tokenize data before training, into megatron-core's .bin/.idx",
        options=preprocess.PreprocessOptions,
        run=preprocess.run,
    ),
    "continual": Command(
        summary="learn one task after the other, and measure the effect of each on earlier tasks",
        options=continual.ContinualOptions,
        run=continual.run,
        note=note,
        first=first_options(continual.FIRST),
    ),
    "evaluate": Command(
        summary="evaluate models on tasks: Hugging Face folders, or checkpoints of runs directly, in any layout",
        options=evaluate.EvaluateOptions,
        run=evaluate.run,
    ),
    "convert": Command(
        summary="convert a checkpoint to a Hugging Face folder, or check the logits of such a folder",
        options=convert.ConvertOptions,
        run=convert.run,
    ),
    "half-reset": Command(
        summary="reset a part of a fine-tuned model's weights to the base model's: drawn matrices, FAPM or DARE",
        options=half_reset.HalfResetOptions,
        run=half_reset.run,
    ),
    "average": Command(
        summary="average the weights of a fine-tuned model with those of its base model",
        options=average.AverageOptions,
        run=average.run,
    ),
    "ties": Command(
        summary="merge models fine-tuned from the same base where their largest changes agree",
        options=ties.TiesOptions,
        run=ties.run,
    ),
    "doctor": Command(
        summary="run preflight checks of the machine, the ranks and a run's inputs, and show what to fix",
        options=doctor.DoctorOptions,
        run=doctor.run,
        first=first_options(doctor.FIRST),
    ),
    "flags": Command(
        summary="list all options of a run, Megatron-LM's flags and other trainers' names, with their meaning here",
        options=flags.FlagsOptions,
        run=flags.run,
    ),
    "completion": Command(
        summary="print the script that completes commands and options in bash, zsh or fish",
        options=completion.CompletionOptions,
        run=_show_completion,
        bare="shell",
    ),
}


def commands() -> dict[str, Command]:
    """Every command by its name: one for each method, then the others."""
    methods = {
        name: Command(
            summary=method.summary,
            options=options_of(method),
            run=partial(run_method, name),
            note=note,
            first=first_options(method.first) if method.first else (),
        )
        for name, method in DECLARED.items()
    }
    return methods | COMMANDS


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``hft-megatron ARGV`` and return its exit code: the ``EXIT_`` constants of ``errors``."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def dispatch(status: StatusFolder) -> None:
        if not arguments or arguments[0] in (*HELP_WORDS, HELP_ALL):
            show(_overview())
            return
        if arguments[0] == VERSION_WORD:
            show(version_text())
            return
        name, *words = arguments
        if name not in commands():
            raise UserError(_unknown_command(name))
        _perform(commands()[name], words, status, prog=f"{PROG} {name}")

    return run_command(dispatch)


def _perform(command: Command, words: Sequence[str], status: StatusFolder, *, prog: str) -> None:
    if not {*HELP_WORDS, HELP_ALL}.isdisjoint(words):
        about, everything = f"{command.summary}.", HELP_ALL in words
        show(help_text(command.options, prog=prog, description=about, first=command.first, everything=everything))
        return
    others = {name: flags_of(command.options) for name, command in commands().items()}
    command.run(load_options(command.options, command.arguments(words), command.note, others), status)


def _overview() -> str:
    about = (
        f"`{PROG} COMMAND --help` shows the options of a command to begin with, {HELP_ALL} all of them; `{PROG} "
        f"{VERSION_WORD}` the versions that are installed.",
        f"`source <({PROG} completion bash)` completes commands and options in bash; `{PROG} completion --help` says "
        f"how in other shells.",
    )
    lines = [f"usage: {PROG} COMMAND OPTIONS", "", "commands:"]
    for name, command in commands().items():
        lines += _wrapped(command.summary, f"  {name:<12} ")
    return "\n".join([*lines, "", *_wrapped(about[0]), *_wrapped(about[1])])


def _wrapped(text: str, label: str = "") -> list[str]:
    """To the width of the terminal, behind a label."""
    width = get_terminal_size().columns
    return wrap(text, width, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False)


def _unknown_command(name: str) -> str:
    nearest = difflib.get_close_matches(name, commands(), n=1, cutoff=0.0)
    return f"{name!r} is not a command; the nearest is {PROG} {nearest[0]}."
