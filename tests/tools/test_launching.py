"""How the tools start a training and show what it says. Run: pytest tests/tools/test_launching.py"""

import os
import sys
from pathlib import Path

import pytest
from launching import DemoError, cpu_environment, run_logged

SPEAKS = """
import os, sys
print("> DP 2 on cpu")
print("a warning", file=sys.stderr, flush=True)
print(" [2026-01-01] iteration 1", flush=True)
print(os.getcwd(), os.environ["MINE"], os.environ["CUDA_VISIBLE_DEVICES"], "RANK" in os.environ, flush=True)
sys.exit(int(sys.argv[1]))
"""


def test_all_that_a_command_says_is_in_the_log_and_its_progress_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    log = tmp_path / "log"
    environment = cpu_environment({"MINE": "set"})
    assert environment.keys() >= os.environ.keys() - {"RANK"}
    run_logged([sys.executable, "-c", SPEAKS, "0"], environment=environment, folder=tmp_path, log=log)
    assert capsys.readouterr().out == "    > DP 2 on cpu\n    [2026-01-01] iteration 1\n"
    said = log.read_text()
    assert said.startswith(f"$ {sys.executable} -c ")
    assert "a warning\n" in said
    assert f"{tmp_path} set  False\n" in said


def test_a_command_that_fails_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"ended with exit code 3; the end of .*/log:(.|\n)*iteration 1\n"):
        run_logged(
            [sys.executable, "-c", SPEAKS, "3"],
            environment={**os.environ, "MINE": "", "CUDA_VISIBLE_DEVICES": ""},
            folder=tmp_path,
            log=tmp_path / "log",
        )
