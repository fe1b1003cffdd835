"""What --help and --help-all show. Run: pytest tests/cli/test_help.py"""

import re
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from hft_megatron.cli import main
from hft_megatron.cli.entry import commands
from hft_megatron.cli.help import help_text
from hft_megatron.config.flags import flags_of
from hft_megatron.config.run import RunConfig
from hft_megatron.errors import EXIT_OK

TRAINING = ("sft", "dpo", "pretrain", "continual", "doctor")
"""Commands with the options of a run."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """As a command declares them."""

    config: str | None = None
    """A file, of which 50 % may be empty."""
    run: RunConfig = field(default_factory=RunConfig)


def shown(text: str) -> list[str]:
    """The options that a help names, without dashes and in order."""
    return re.findall(r"^  --([a-z0-9-]+)", text, re.MULTILINE)


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == EXIT_OK
    return capsys.readouterr().out


@pytest.mark.parametrize("command", commands())
def test_every_option_has_words(command: str) -> None:
    wordless = [name for name, flag in flags_of(commands()[command].options).items() if not flag.words]
    assert wordless == [], "say below the field what the option does"


@pytest.mark.parametrize("command", commands())
def test_every_option_is_in_the_whole_help_once(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = asked(capsys, command, "--help-all")
    assert sorted(shown(text)) == sorted(flags_of(commands()[command].options))
    assert "--help-all" not in text


@pytest.mark.parametrize("command", TRAINING)
def test_the_short_help_has_the_options_to_begin_with_and_names_the_whole_one(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = asked(capsys, command, "--help")
    flags = flags_of(commands()[command].options)
    assert 20 <= len(shown(text)) <= 30
    assert {"load-hf", "lr", "save", "hft-ratio", "seed"} <= set(shown(text))
    last = f"These are the options to begin with; `hft-megatron {command} --help-all` shows all {len(flags)}."
    assert " ".join(text.splitlines()[-2:]).endswith(last)


def test_names_of_options_to_begin_with_are_options() -> None:
    of_runs = set().union(*(flags_of(command.options) for command in commands().values()))
    for name, command in commands().items():
        assert set(command.first) <= of_runs, name
        lacking = set(command.first) - set(flags_of(command.options))
        assert lacking <= {"check"}, name


def test_a_command_of_few_options_shows_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(capsys, "average", "--help") == asked(capsys, "average", "--help-all")


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("words", [["sft", "--help-all"], ["sft", "--help"], ["evaluate", "--help"], ["--help"]])
def test_a_text_is_wrapped_once_to_the_width_of_the_terminal(
    words: list[str], columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = asked(capsys, *words)
    lines = text.splitlines()
    too_long = [line for line in lines if len(line) > columns and not line.startswith("  --")]
    assert too_long == []
    # Text that went on where a line ends early would have fitted onto it.
    for line, following in pairwise(lines):
        indent = len(line) - len(line.lstrip())
        if indent == 8 and following.startswith(" " * 8) and not following[8:].startswith(" "):
            assert len(line) + 1 + len(following.split()[0]) > columns - 2, (line, following)


def test_an_option_has_words_bounds_choices_and_default_in_the_group_of_the_dataclass() -> None:
    text = help_text(Options, prog="hft-megatron sft", description="Fine-tune.")
    said = " ".join(text.split())
    for expected in (
        "usage: hft-megatron sft OPTIONS Fine-tune. options: --config TEXT A file, of which 50 % may be empty. "
        "(default: unset)",
        "parallel options: ",
        "--tensor-model-parallel-size INT ",
        "--bf16, --no-bf16 ",
        "--loss-on {assistant,all,last} ",
        "--train-data-path TEXT [TEXT ...] ",
        "--iterations-to-skip INT [INT ...] ",
        "--data-format NAME ",
        "(one of messages, ",
        "(above 0 and at most 1; default: unset)",
        "(at least 0; default: 1e-05)",
        "(default: on)",
    ):
        assert expected in said
    for group in ("parallel", "model", "training", "optimizer", "data", "hft", "checkpoint", "logging"):
        assert f"\n{group} options:\n" in text


def test_groups_have_the_order_of_the_options_to_begin_with_in_both_forms() -> None:
    first = ("config", "lr", "micro-batch-size")
    for everything in (False, True):
        text = help_text(Options, prog="p", description="", first=first, everything=everything)
        headings = re.findall(r"^(\w+ )?options:", text, re.MULTILINE)
        assert headings[:3] == ["", "optimizer ", "training "]


def test_the_list_of_commands_is_wrapped_behind_their_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = asked(capsys, "--help").splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("  plan "))
    assert lines[begin + 1].startswith(" " * 15)
