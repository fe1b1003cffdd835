"""What a shell completes. Run: pytest tests/cli/test_completion.py"""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
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
    assert offered(script, "completion", "b") == ["bash"]
    assert offered(script, "completion", "bash", "--s") == ["--shell"]


def test_bash_offers_files_where_it_has_nothing_of_its_own(script: Path) -> None:
    assert offered(script, "sft", "--load-hf", "") == []
    assert offered(script, "sft", "--train-data-path", "a.jsonl", "b") == []
    assert "\ncomplete -o default -F _hft_megatron hft-megatron\n" in script.read_text()


@pytest.fixture
def of_shell(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The script of a shell, which must be installed."""
    if shutil.which(request.param) is None:
        pytest.skip(f"needs {request.param}; .ci/install-system.sh installs it")
    assert main(["completion", request.param]) == EXIT_OK
    path = tmp_path / "script"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.mark.parametrize("of_shell", ["fish"], indirect=True)
def test_fish_completes_commands_options_and_values(of_shell: Path) -> None:
    def offered(line: str) -> list[str]:
        command = ["fish", "--no-config", "-c", "source $argv[1]; complete -C $argv[2]", str(of_shell), line]
        said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=of_shell.parent).stdout
        return [line.partition("\t")[0] for line in said.splitlines()]

    assert offered("hft-megatron pre") == ["preprocess", "pretrain"]
    assert offered("hft-megatron sft --lr-wsd-decay-st") == ["--lr-wsd-decay-style"]
    assert offered("hft-megatron sft --loss-on l") == ["last"]
    assert offered("hft-megatron completion z") == ["zsh"]
    assert "--version" in offered("hft-megatron --")


@pytest.mark.parametrize("of_shell", ["zsh"], indirect=True)
def test_zsh_completes_commands_options_and_values(of_shell: Path) -> None:
    """On a terminal: outside of one zsh completes nothing."""
    terminal, shell_side = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), shell_side)
    shell = subprocess.Popen(["zsh", "-f", "-i"], cwd=of_shell.parent, start_new_session=True, **streams)
    try:
        setup = f"PS1=; autoload -U compinit && compinit -u -D; source {of_shell}; echo is-$((1))-ready\n"
        os.write(terminal, setup.encode())
        await_text(terminal, "is-1-ready")
        for typed, completed in (
            ("hft-megatron evalu", "hft-megatron evaluate"),
            ("hft-megatron sft --lr-wsd-decay-st", "--lr-wsd-decay-style"),
            ("hft-megatron sft --loss-on l", "--loss-on last"),
            ("hft-megatron completion z", "completion zsh"),
        ):
            os.write(terminal, f"\x15{typed}\t".encode())
            await_text(terminal, completed)
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)
        os.close(shell_side)


def await_text(terminal: int, text: str) -> None:
    said, deadline = b"", time.monotonic() + 30
    while text.encode() not in said:
        assert time.monotonic() < deadline, said
        if select.select([terminal], [], [], 1)[0]:
            said += os.read(terminal, 4096)


def test_the_script_for_fish_has_each_option_with_the_commands_that_take_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["completion", "fish"]) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    of_loss = [line for line in lines if " -l loss-on " in line]
    assert " -x -a 'assistant all last' -d " in of_loss[0]
    assert "'__fish_seen_subcommand_from sft dpo " in of_loss[0]
    assert "complete -c hft-megatron -n '__fish_seen_subcommand_from completion' -f -a 'bash zsh fish'" in lines
    assert any(line.startswith("complete -c hft-megatron -n __fish_use_subcommand -l version ") for line in lines)
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
