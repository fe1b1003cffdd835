"""``hft-megatron convert`` from its words to its exit code. Run: pytest tests/cli/test_convert.py"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hft_megatron.cli import convert, main
from hft_megatron.errors import EXIT_OK, EXIT_USAGE
from tests.support import forked
from tests.support.ranks import REPOSITORY, RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for

MISTAKES = [
    ("--save-hf OUT", "Give either --load RUN"),
    ("--load RUN --load-hf MODEL --check", "Give either --load RUN"),
    ("--load RUN", "--save-hf is missing"),
    ("--load RUN --save-hf FULL", "FULL is not empty"),
    ("--load RUN --save-hf FULL/file", "is a file, not a folder"),
    ("--load absent --save-hf OUT", "holds no complete checkpoint"),
    ("--load RUN --save-hf OUT", "holds no complete checkpoint"),
    ("--load RUN --save-hf OUT --iteration 7", "holds no complete checkpoint"),
    ("--load RUN --save-hf OUT --iteration x", "--iteration x: the value must be"),
    ("--load RUN --save-hf OUT --save-dtype int8", "--save-dtype int8: the value must be"),
    ("--load RUN --save-hf OUT --chek", "--chek"),
    ("--load-hf MODEL", "needs --check"),
    ("--load-hf MODEL --save-hf OUT --check", "--train-iters 0"),
    ("--load-hf MODEL --check", 'model_type is "gpt2"'),
]


@pytest.mark.parametrize(("command", "said"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for folder in ("RUN", "MODEL", "FULL"):
        (tmp_path / folder).mkdir()
    (tmp_path / "FULL" / "file").touch()
    (tmp_path / "MODEL" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    # It would name this process, which has other tests to run, a run of one rank.
    monkeypatch.setattr(convert.launch, "place_this_process", lambda: None)
    assert main(["convert", *command.split()]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "OUT").exists()


def test_it_is_not_started_by_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["convert", "--load", "RUN", "--save-hf", "OUT"]) == EXIT_USAGE
    assert "start it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["convert_checkpoint", "preprocess_data", "half_reset", "average_weights"])
def test_the_former_name_of_a_command_shows_its_help_without_torch(program: str) -> None:
    command = [sys.executable, "-X", "importtime", f"tools/{program}.py", "--help"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    assert done.returncode == EXIT_OK
    assert {"--save-hf", "--output-prefix", "--output"} & set(done.stdout.split())
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hft_megatron.errors" in imported
    assert not {"torch", "megatron", "transformers"} & imported


@pytest.mark.slow
def test_one_command_converts_a_run_and_checks_the_logits(ranks: RankPools, tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    words = words_for(inputs, "--train-iters", 3, "--save", tmp_path / "run", "--tensor-model-parallel-size", 2)
    ranks(2).run(run_sft_words, words=words)
    out = str(tmp_path / "out")
    for options in (["--load", str(tmp_path / "run"), "--save-hf", out], ["--load-hf", out]):
        done = forked.run(["-m", "hft_megatron", "convert", *options, "--check"], tmp_path)
        assert done.returncode == EXIT_OK, done.stderr
        assert f"check of {out}: logits of 2 sequences differ" in done.stdout
        assert "tolerance 0.0001" in done.stdout
    assert (tmp_path / "out" / "tokenizer.json").exists()
