"""What a shell completes. Run: pytest tests/cli/test_completion.py"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hft_megatron.cli import main
from hft_megatron.cli.entry import commands
from hft_megatron.config.flags import flags_of
from hft_megatron.errors import EXIT_OK, EXIT_USAGE

ASK = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_hft_megatron
printf '%s\\n' "${COMPREPLY[@]}"
"""
"""Has bash complete the last of its words, as its own completion calls the function."""


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", "bash"]) == EXIT_OK
    path = tmp_path / "completion.bash"
    path.write_text(capsys.readouterr().out)
    return path


def offered(script: Path, *words: str) -> list[str]:
    command = ["bash", "-u", "-c", ASK, "bash", str(script), "hft-megatron", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_bash_completes_commands(script: Path) -> None:
    assert offered(script, "") == [*commands(), "--help", "--version"]
    assert offered(script, "pre") == ["pretrain", "preprocess"]


def test_bash_completes_the_options_of_the_command(script: Path) -> None:
    assert offered(script, "sft", "--lr-w") == [
        *("--lr-wsd-decay-iters", "--lr-wsd-decay-samples", "--lr-wsd-decay-style"),
        *("--lr-warmup-init", "--lr-warmup-iters", "--lr-warmup-samples", "--lr-warmup-fraction"),
    ]
    assert offered(script, "sft", "--check", "--no-man") == ["--no-manual-gc", "--no-manual-gc-eval"]
    assert offered(script, "sft", "--mock") == []
    assert offered(script, "pretrain", "--mock") == ["--mock-data"]
    for name, command in commands().items():
        found = offered(script, name, "")
        assert {f"--{flag}" for flag in flags_of(command.options)} <= set(found), name
        assert {"--help", "--help-all"} <= set(found)


def test_bash_completes_values_of_options_that_have_a_few(script: Path) -> None:
    assert offered(script, "sft", "--loss-on", "") == ["assistant", "all", "last"]
    assert offered(script, "sft", "--loss-on", "a") == ["assistant", "all"]
    assert offered(script, "sft", "--loss-on", "=") == ["assistant", "all", "last"]
    assert offered(script, "sft", "--loss-on", "=", "la") == ["last"]
    assert offered(script, "completion", "--shell", "z") == ["zsh"]


def test_bash_offers_files_where_it_has_nothing_of_its_own(script: Path) -> None:
    assert offered(script, "sft", "--load-hf", "") == []
    assert offered(script, "sft", "--train-data-path", "a.jsonl", "b") == []
    assert "\ncomplete -o default -F _hft_megatron hft-megatron\n" in script.read_text()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_their_script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    assert main(["completion", shell]) == EXIT_OK
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    if shell == "zsh":
        ask = (
            "autoload -U compinit && compinit -u && source $1 && emulate sh -c 'COMP_WORDS=(hft-megatron sft "
            '--loss-on l); COMP_CWORD=3; _hft_megatron\' && print -l -- "${COMPREPLY[@]}"'
        )
        command = ["zsh", "-f", "-c", ask, "zsh", str(script)]
    else:
        ask = "source $argv[1]; complete -C 'hft-megatron sft --loss-on l'"
        command = ["fish", "--no-config", "-c", ask, str(script)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert said.split()[0] == "last"


def test_the_script_for_fish_has_each_option_with_the_commands_that_take_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["completion", "fish"]) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    of_loss = [line for line in lines if " -l loss-on " in line]
    assert " -x -a 'assistant all last' -d " in of_loss[0]
    assert "'__fish_seen_subcommand_from sft dpo " in of_loss[0]
    assert any(line.startswith("complete -c hft-megatron -n __fish_use_subcommand -f -a sft -d '") for line in lines)


def test_a_shell_that_is_not_known_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == EXIT_USAGE
    assert "--shell tcsh: the value must be one of bash, zsh, fish." in capsys.readouterr().err


def test_the_script_is_made_without_torch() -> None:
    program = (
        "import sys; from hft_megatron.cli import main; main(['completion', 'bash']); "
        "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
