"""``hft-megatron preprocess`` from its words to a run on its output.

Run: pytest tests/cli/test_preprocess.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hft_megatron.cli import main
from hft_megatron.errors import EXIT_OK, EXIT_STOPPED, EXIT_USAGE
from tests.support.data_files import write_rows
from tests.support.preprocessing import contents, conversations
from tests.support.ranks import REPOSITORY, RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for
from tests.support.tokenizers import make_byte_level


def words(data: Path, prefix: Path, tokenizer: Path, *options: object) -> list[str]:
    given = ["--input", data, "--output-prefix", prefix, "--tokenizer-model", tokenizer, "--workers", 2, *options]
    return [str(word) for word in given]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_a_run_on_preprocessed_data_has_the_losses_of_the_file_and_goes_on_with_its_run(
    ranks: RankPools, tmp_path: Path, packing: bool
) -> None:
    inputs = make_inputs(tmp_path)
    model, data = inputs / "model", inputs / "data.jsonl"
    assert main(["preprocess", *words(data, tmp_path / "made", model, "--seq-length", 96)]) == EXIT_OK
    options = ["--packing", "--packing-window", "10"] if packing else []
    plain = words_for(inputs, *options)
    made = words_for(inputs, *options, "--train-data-path", tmp_path / "made")
    whole, again = (ranks(1).run(run_sft_words, words=run)[0] for run in (plain, made))
    assert again["steps"] == whole["steps"]
    assert again["state"] == whole["state"]
    # The digest is that of the file as well, so a run may change from one to the other.
    saved = ["--save", str(tmp_path / "run"), "--load", str(tmp_path / "run")]
    first = ranks(1).run(run_sft_words, words=[*plain, *saved, "--train-iters", "3", "--lr-decay-style", "constant"])[0]
    constant = ranks(1).run(run_sft_words, words=[*made, "--lr-decay-style", "constant"])[0]
    second = ranks(1).run(run_sft_words, words=[*made, *saved, "--lr-decay-style", "constant"])[0]
    assert first["steps"] + second["steps"] == constant["steps"]
    assert second["state"] == constant["state"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, rows.jsonl, and what nobody interrupted under the prefix ``whole``."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_rows(folder / "rows.jsonl", conversations(15000))
    assert main(["preprocess", *words(data, folder / "whole", make_byte_level(folder / "tokenizer"))]) == EXIT_OK
    return folder


@pytest.mark.slow(reason="15,000 rows, so that a signal comes in their middle, are tokenized twice")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_or_interrupted_command_leaves_no_process_and_goes_on_to_the_same_bytes(
    whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    given = words(whole / "rows.jsonl", tmp_path / "killed", whole / "tokenizer", "--log-interval", 1000)
    command = [sys.executable, "-m", "hft_megatron", "preprocess", *given]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    # Its own process group: a signal of a terminal goes to workers as well.
    process = subprocess.Popen(
        command, env=variables, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "documents/s" in process.stdout.readline()
    if number is signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)
    _, said = process.communicate()
    if number is not signal.SIGKILL:
        assert process.returncode == EXIT_STOPPED
        assert f"stopped by {number.name} after " in said
        assert "Traceback" not in said
    deadline = time.monotonic() + 20
    while any_in_group(process.pid):
        assert time.monotonic() < deadline, "workers are left"
        time.sleep(0.05)
    assert not (tmp_path / "killed.idx").exists()
    again = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert number is signal.SIGKILL or "resuming after " in again.stdout
    assert contents(tmp_path / "killed") == contents(whole / "whole")


def any_in_group(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--workers", "0"], "--workers 0: must be a whole number of at least 1."),
        (["--seq-length", "0"], "--seq-length 0: must be a whole number of at least 1."),
        (["--input", "absent.jsonl"], "--input absent.jsonl: there is no such file."),
        (["--input", "2", "rows.jsonl"], "--input 2 rows.jsonl: weights belong to training, which takes them"),
        (["--output-prefix", "rows.jsonl/x"], "--output-prefix rows.jsonl/x cannot be written: Not a directory."),
        (["--tokenizer-model", "absent"], "--tokenizer-model absent does not exist; name a Hugging Face folder"),
        (
            ["--seq-length", "5"],
            "rows.jsonl:1: the example has 9 positions, but --seq-length is 5; choose --long-examples",
        ),
        (["--on-bad-line", "pass"], "--on-bad-line pass: the value must be one of stop, skip."),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "1234 ", "completion": "567"}])
    tokenizer = make_byte_level(tmp_path / "tokenizer")
    assert main(["preprocess", *words(Path("rows.jsonl"), Path("out"), tokenizer), *options]) == EXIT_USAGE
    said = capfd.readouterr().err
    assert sentence in said
    assert len(said.splitlines()) == 1


def test_what_is_missing_is_named_first(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["preprocess", "--input", "a.jsonl"]) == EXIT_USAGE
    assert "--output-prefix is missing; see `hft-megatron preprocess --help`" in capfd.readouterr().err
