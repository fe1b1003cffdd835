"""Exports during training. Run: pytest tests/trainer/test_hf_exports.py"""

import json
import shutil
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from hft_megatron.errors import EXIT_OK, RunFailed
from tests.checkpoint.test_interrupted_processes import kill_all
from tests.checkpoint.test_verification import run_refused
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, read_metrics, run_cli, run_sft_words, start_cli, words_for, write_data
from tests.trainer.test_convert import PP2, ROUNDS, TP2, convert, files

CASES = {"tp2": [*TP2, *ROUNDS], "pp2": [*PP2, "--hft-round-interval", "3"]}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("exports"), dtype=torch.float16)
    write_data(folder / "valid.jsonl", 5)
    return folder


def words(inputs: Path, folder: Path, *options: object) -> list[str]:
    """Six steps, exports after every second and validations with them."""
    saves = ["--save", folder / "run", "--load", folder / "run", "--save-hf", folder / "out", "--save-hf-interval", 2]
    validates = ["--valid-data-path", inputs / "valid.jsonl", "--eval-interval", 2]
    return words_for(inputs, "--bf16", "--lr-warmup-iters", 0, *saves, *validates, *options)


def exports_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir() if path.is_dir())


def noted_in(folder: Path) -> dict[str, Any]:
    noted: dict[str, Any] = json.loads((folder / "out" / "exports.json").read_text())
    return noted


@pytest.mark.parametrize("case", CASES)
def test_every_export_is_the_checkpoint_of_its_iteration_and_loads_in_transformers(
    case: str, ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = words(inputs, tmp_path, *CASES[case], "--save-interval", 2, "--train-iters", 4)
    ranks(2).run(run_sft_words, words=run)
    assert exports_in(tmp_path) == ["iter_0000002", "iter_0000004"]
    for iteration in (2, 4):
        export = tmp_path / "out" / f"iter_{iteration:07d}"
        convert(tmp_path / "run", tmp_path / f"converted{iteration}", iteration=iteration)
        assert files(export) == files(tmp_path / f"converted{iteration}")
        _, info = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert AutoTokenizer.from_pretrained(export).eos_token == "<|im_end|>"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float16
    last = files(tmp_path / "out" / "iter_0000004")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in last} == last
    first = load_file(tmp_path / "out" / "iter_0000002" / "model.safetensors")
    assert any(not torch.equal(tensor, first[name]) for name, tensor in load_file(export / "model.safetensors").items())


@pytest.mark.slow(reason="three runs and their exports")
def test_a_run_that_was_stopped_resumes_with_its_exports_and_notes(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    options = ("--save-hf-keep", 2, "--save-hf-best", "lm loss", *PP2)
    for name, kill_at in (("whole", None), ("stopped", 3)):
        ranks(2).run(run_sft_words, words=words(inputs, tmp_path / name, *options), kill_at=kill_at)
    assert exports_in(tmp_path / "stopped") == ["iter_0000002"]
    assert not (tmp_path / "stopped" / "out" / "config.json").exists()
    (tmp_path / "stopped" / "out" / ".iter_0000004.unfinished").mkdir()
    ranks(2).run(run_sft_words, words=words(inputs, tmp_path / "stopped", *options))
    for name in ("iter_0000004", "iter_0000006"):
        whole, stopped = (files(tmp_path / run / "out" / name) for run in ("whole", "stopped"))
        assert whole == stopped
    noted, other = (noted_in(tmp_path / run) for run in ("whole", "stopped"))
    assert noted | {"run": ""} == other | {"run": ""}
    values = {
        line["iteration"]: line["lm loss validation"]
        for line in read_metrics(tmp_path / "whole" / "run")
        if "lm loss validation" in line
    }
    best = min(values, key=lambda iteration: values[iteration])
    assert (noted["metric_for_best_model"], noted["best_global_step"], noted["best_metric"]) == (
        "lm loss",
        best,
        values[best],
    )
    kept = {f"iter_{iteration:07d}" for iteration in (4, 6, best)}
    assert set(exports_in(tmp_path / "whole")) == set(exports_in(tmp_path / "stopped")) == kept
    assert noted["exports"].keys() == kept

    # A finished run that is started again has nothing to do; a longer one needs another folder.
    [said, _] = ranks(2).run(run_sft_words, words=words(inputs, tmp_path / "whole", *options))
    assert any("already holds the export of iteration 6" in line for line in said["said"])
    longer = words(inputs, tmp_path / "whole", *options, "--train-iters", 8)
    [refused, _] = ranks(2).run(run_refused, words=longer)
    assert (
        "already holds the final export of this run, of iteration 6; choose a new folder for the export of iteration 8"
        in refused
    )


def test_a_finished_run_that_is_started_again_keeps_its_only_export(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    def run(*options: object) -> list[str]:
        saves = ["--save", tmp_path / "run", "--load", tmp_path / "run", "--save-hf", tmp_path / "out"]
        return words_for(inputs, "--bf16", "--lr-warmup-iters", 0, *saves, *options)

    ranks(1).run(run_sft_words, words=run("--train-iters", 2))
    before = files(tmp_path / "out")
    assert noted_in(tmp_path)["final_iteration"] == 2
    [again] = ranks(1).run(run_sft_words, words=run("--train-iters", 2))
    assert any("out already holds the export of iteration 2" in line for line in again["said"])
    assert files(tmp_path / "out") == before
    [longer] = ranks(1).run(run_refused, words=run("--train-iters", 3))
    assert "already holds the final export of this run, of iteration 2; choose a new folder" in longer
    shutil.move(tmp_path / "run", tmp_path / "moved")
    [other] = ranks(1).run(run_refused, words=run("--train-iters", 2))
    assert f"holds exports of a run other than the one in --save {tmp_path}/run" in other


def test_exports_of_another_run_are_not_touched(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    ranks(1).run(run_sft_words, words=words(inputs, tmp_path, "--train-iters", 3), kill_at=2)
    before = files(tmp_path / "out" / "iter_0000002")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    [said] = ranks(1).run(run_refused, words=words(inputs, tmp_path))
    assert said.startswith(
        f"--save-hf {tmp_path}/out holds exports of a run other than the one in --save {tmp_path}/run; choose"
    )
    (tmp_path / "out" / "mine.txt").write_text("notes")
    moved = ["--save", tmp_path / "moved", "--load", tmp_path / "moved"]
    [said] = ranks(1).run(run_refused, words=words(inputs, tmp_path, *moved))
    assert said == f"--save-hf {tmp_path}/out is not empty; choose a new folder, or empty this one."
    (tmp_path / "out" / "mine.txt").unlink()
    ranks(1).run(run_sft_words, words=words(inputs, tmp_path, *moved, "--train-iters", 3))
    assert files(tmp_path / "out" / "iter_0000002") == before
    assert (tmp_path / "out" / "config.json").exists()


def run_on_a_full_disk(words: list[str]) -> str:
    """The sentence of a run whose second export cannot be written."""
    from hft_megatron.conversion.shard_writer import ShardWriter

    write = ShardWriter.write

    def fail(writer: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        if "iter_0000004" in str(writer.folder) and "layers.1" in name:
            raise OSError(28, "No space left on device")
        write(writer, name, tensor)

    with patch.object(ShardWriter, "write", fail):
        try:
            run_sft_words(words)
        except RunFailed as failure:
            return str(failure)
    return ""


def test_an_export_that_cannot_be_written_ends_all_ranks_after_the_checkpoint_of_its_step(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    said = ranks(2).run(run_on_a_full_disk, words=words(inputs, tmp_path, *PP2, "--save-interval", 2))
    assert said[0] == said[1]
    assert f"the export to {tmp_path}/out/iter_0000004 cannot be written: [Errno 28] No space left" in said[0]
    assert f"the newest complete checkpoint is {tmp_path}/run/iter_0000004" in said[0]
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["exports.json", "iter_0000002"]


@pytest.mark.slow(reason="four runs of two real ranks each, three of which are killed")
def test_a_run_that_is_killed_in_an_export_leaves_none_that_looks_complete_and_resumes(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs", hidden_size=256, intermediate_size=1024)
    log = tmp_path / "log"

    def command(name: str) -> list[str]:
        folder = tmp_path / name
        saves = ["--save", folder / "run", "--load", folder / "run", "--save-interval", 1]
        return words_for(inputs, *TP2, *saves, "--save-hf", folder / "out", "--save-hf-interval", 1)

    assert run_cli(command("whole"), ranks=2, log=log) == EXIT_OK, log.read_text()[-4000:]
    caught = 0
    for iteration in (2, 4, 6):
        process = start_cli(command("killed"), ranks=2, log=log)
        unfinished = tmp_path / "killed" / "out" / f".iter_{iteration:07d}.unfinished"
        deadline = time.monotonic() + 120
        while not unfinished.exists():
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline
        kill_all(process)
        process.wait()
        caught += unfinished.exists()
        for path in (tmp_path / "killed" / "out").glob("iter_*"):
            assert files(path) == files(tmp_path / "whole" / "out" / path.name)
    assert caught > 0, "a kill must come in the middle"
    assert run_cli(command("killed"), ranks=2, log=log) == EXIT_OK, log.read_text()[-4000:]
    whole, killed = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "whole" / "out", tmp_path / "killed" / "out")
    )
    del whole["exports.json"], killed["exports.json"]
    assert whole == killed
