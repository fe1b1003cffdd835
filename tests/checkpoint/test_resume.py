"""A run that stops and resumes is the run that never stopped, beyond the rows of tests/trainer/test_run_matrix.py."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, read_metrics, run_sft_words, words_for
from tests.support.tiers import quick

TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "20000"]
VPP = [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def losses(values: list[dict[str, Any]]) -> list[float]:
    return [step["loss"] for step in values[-1]["steps"]]


def run_whole_and_in_two(
    ranks: RankPools, world_size: int, words: list[str], folder: Path, *, kill_at: int
) -> list[dict[str, Any]]:
    """What each rank returned of a run that never stopped, which one stopped after ``kill_at`` must equal."""
    pool = ranks(world_size)
    whole = pool.run(run_sft_words, words=words)
    saved = [*words, "--save", str(folder), "--load", str(folder)]
    # The last rank alone gets the signal: all must stop at the same step.
    first = pool.run(run_sft_words, words=saved, kill_at=kill_at, kill_rank=world_size - 1)
    second = pool.run(run_sft_words, words=saved)

    assert [rank["stopped"] is None for rank in first] == [False] * world_size
    assert [step["iteration"] for step in second[0]["steps"]] == list(range(kill_at + 1, 7))
    for rank in range(world_size):
        assert first[rank]["steps"] + second[rank]["steps"] == whole[rank]["steps"]
        different = {
            name for name in whole[rank]["state"] if whole[rank]["state"][name] != second[rank]["state"].get(name)
        }
        assert not different, f"rank {rank}"
        assert whole[rank]["state"].keys() == second[rank]["state"].keys()
    assert all(isinstance(loss, float) for loss in losses(whole))
    assert max(step["lr"] for step in whole[-1]["steps"]) > 0, "else nothing was trained"
    return whole


ROUNDS = ["--hft-round-interval", "2"]
HIFT = ["--hft-selection", "hift", "--hft-ratio", "0.3", "--lr-warmup-iters", "0"]
RISING = ["--weight-decay-incr-style", "cosine", "--start-weight-decay", "0", "--end-weight-decay", "0.5"]
ROUND_CASES: dict[str, tuple[int, list[str]]] = {
    "groups in turn, so that one stage is frozen": (2, [*ROUNDS, *HIFT, *PP2]),
    "scores computed once": (2, [*ROUNDS, "--hft-selection", "spectrum", "--hft-rotation", "complementary"]),
    "a rate of their own for embedding and head": (
        2,
        [*ROUNDS, *PP2, "--decoupled-lr", "1e-3", *RISING],
    ),
    "gradients that are added up in bf16": (2, [*ROUNDS, *OVERLAP, "--bf16", "--grad-reduce-in-bf16"]),
    "a rate of its own in every round": (1, ["--hft-round-interval", "4", "--hft-lr-schedule", "round"]),
}
"""World size and options of what tests/trainer/test_run_matrix.py has no column for."""


QUICK = ["groups in turn, so that one stage is frozen", "a rate of its own in every round"]


@pytest.mark.parametrize("case", quick(ROUND_CASES, QUICK))
def test_resume_equals_uninterrupted_across_rounds(case: str, ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    world_size, options = ROUND_CASES[case]
    whole = run_whole_and_in_two(ranks, world_size, words_for(inputs, *options), tmp_path, kill_at=3)
    assert set(json.loads(whole[0]["state"]["unit steps"]).values()) == {2}


def in_samples(inputs: Path, *options: object) -> list[str]:
    """The words of a run of six steps of 2, 2, 2, 4, 4 and 4 samples, whose schedule counts samples."""
    words = words_for(inputs, "--train-samples", 20, "--rampup-batch-size", 2, 2, 6, "--lr-warmup-samples", 4, *options)
    for name in ("--train-iters", "--lr-warmup-iters"):
        del words[words.index(name) : words.index(name) + 2]
    return words


STARTS = [0, 2, 4, 6, 10, 14]
"""Samples before every step of those."""


@pytest.mark.slow(reason="four runs, at two data-parallel sizes")
def test_a_run_whose_batches_grow_resumes_at_its_sample_also_at_another_data_parallel_size(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    words = in_samples(inputs, *ROUNDS, "--lr-decay-style", "WSD", "--lr-wsd-decay-samples", 8)
    whole = run_whole_and_in_two(ranks, 1, words, tmp_path, kill_at=2)[0]["steps"]
    assert [step["consumed"] for step in whole] == [*STARTS[1:], 18]
    # Warm-up over 4 of 20 samples, then 5e-3 until 8 before the end, then by 2 x 0.5^x - 1.
    expected = [0, 2 / 4, 1, 1, 1, 2 * 0.5 ** (2 / 8) - 1]
    assert [step["lr"] for step in whole] == pytest.approx([5e-3 * share for share in expected])
    assert [line["global batch size"] for line in read_metrics(tmp_path)] == [2, 2, 2, 4, 4, 4]

    shutil.rmtree(tmp_path / "iter_0000006")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    # What it leaves out is as the run has it.
    del words[words.index("--global-batch-size") : words.index("--global-batch-size") + 2]
    resumed = ranks(2).run(run_sft_words, words=[*words, "--save", str(tmp_path), "--load", str(tmp_path)])[-1]["steps"]
    for step, same in zip(resumed, whole[2:], strict=True):
        assert (step["iteration"], step["consumed"], step["lr"]) == (same["iteration"], same["consumed"], same["lr"])
        assert (step["loss"], step["grad_norm"]) == pytest.approx((same["loss"], same["grad_norm"]), rel=1e-5)


@pytest.mark.slow
def test_a_run_continues_to_another_number_of_iterations(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    words = words_for(inputs, "--lr-decay-style", "constant")
    saved = [*words, "--save", str(tmp_path), "--load", str(tmp_path)]
    [whole] = ranks(1).run(run_sft_words, words=words)
    [first] = ranks(1).run(run_sft_words, words=[*saved, "--train-iters", "3"])
    [second] = ranks(1).run(run_sft_words, words=saved)
    assert first["steps"] + second["steps"] == whole["steps"]
    assert second["state"] == whole["state"]


SCHEDULE = ["--lr-decay-style", "cosine", "--lr-warmup-iters", "1", "--min-lr", "1e-4"]
KEEP = "--use-checkpoint-opt-param-scheduler"
OVERRIDE = "--override-opt-param-scheduler"


@pytest.fixture(scope="session")
def interrupted(ranks: RankPools, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(folder of a run of four iterations that was stopped after two, what it is without a stop)."""
    folder, words = tmp_path_factory.mktemp("interrupted") / "run", words_for(inputs, *SCHEDULE, "--train-iters", 4)
    [whole] = ranks(1).run(run_sft_words, words=words)
    ranks(1).run(run_sft_words, words=[*words, "--save", str(folder)], kill_at=2)
    return folder, whole


def lengthened(
    ranks: RankPools, inputs: Path, interrupted: tuple[Path, Any], folder: Path, *options: object
) -> tuple[Any, list[str]]:
    """Results of the run that resumes after the second iteration, and its lines about the schedule."""
    if not folder.exists():
        shutil.copytree(interrupted[0], folder)
    words = words_for(inputs, *SCHEDULE, "--save", folder, "--load", folder, "--train-iters", 6, *options)
    [found] = ranks(1).run(run_sft_words, words=words)
    return found, [line for line in found["said"] if " -> " in line or "run now has" in line]


def test_a_run_that_is_made_longer_says_that_its_learning_rates_are_others(
    ranks: RankPools, inputs: Path, interrupted: tuple[Path, Any], tmp_path: Path
) -> None:
    longer = ("--weight-decay", 0.2, "--adam-beta2", 0.99)
    found, said = lengthened(ranks, inputs, interrupted, tmp_path / "run", *longer)
    assert [step["lr"] for step in found["steps"]][:2] != [step["lr"] for step in interrupted[1]["steps"]][2:]
    differing = (
        "(checkpoint -> this command): length of the decay in iterations 4 -> 6, --weight-decay 0.1 -> 0.2, "
        "--adam-beta2 0.999 -> 0.99"
    )
    assert said == [
        "> warning: the learning rate schedule or optimizer differs from iteration 2; this command's values are "
        f"used {differing}; give {KEEP} to keep the checkpoint's, or {OVERRIDE} to confirm",
        "> the run now has 6 iterations; it had 4 when iteration 2 was saved",
    ]
    _, again = lengthened(ranks, inputs, interrupted, tmp_path / "run", *longer)
    assert again == [], "the checkpoint of iteration 6 notes what it was trained with"
    meant, said = lengthened(ranks, inputs, interrupted, tmp_path / "meant", *longer, OVERRIDE)
    assert meant["steps"] == found["steps"]
    assert said[0] == f"> {OVERRIDE}: this command's values are used where those of iteration 2 differ {differing}"


@pytest.mark.slow
def test_a_run_that_is_made_longer_keeps_its_losses_bit_for_bit_with_the_checkpoints_schedule(
    ranks: RankPools, inputs: Path, interrupted: tuple[Path, Any], tmp_path: Path
) -> None:
    others = ("--lr", 1e-4, "--weight-decay", 0.3, "--adam-beta1", 0.5, "--adam-eps", 1e-3, "--clip-grad", 0.01)
    found, said = lengthened(ranks, inputs, interrupted, tmp_path / "run", *others, KEEP)
    assert [step["iteration"] for step in found["steps"]] == [3, 4, 5, 6]
    assert found["steps"][:2] == interrupted[1]["steps"][2:]
    assert [step["lr"] for step in found["steps"][2:]] == [1e-4, 1e-4]
    assert said[0].startswith(f"> {KEEP}: the values of iteration 2 are used where they differ (checkpoint -> this ")
    assert "--lr 0.005 -> 0.0001, length of the decay in iterations 4 -> 6, --weight-decay 0.1 -> 0.3" in said[0]
    assert said[1].endswith(
        "when iteration 2 was saved; warning: from iteration 4 on the learning rate is --min-lr 0.0001"
    )
    again, said = lengthened(ranks, inputs, interrupted, tmp_path / "run", "--train-iters", 8)
    assert "length of the decay in iterations 4 -> 8" in said[0], "what was used is what the next checkpoint notes"
    assert again["steps"][0]["iteration"] == 7


PP4 = ["--pipeline-model-parallel-size", "4", "--lr-decay-style", "constant"]
IDLE = [*PP4, "--hft-freeze-embedding", "--hft-ratio", "0"]


@pytest.mark.slow
def test_all_pipeline_stages_but_the_last_own_nothing_to_train_and_the_run_resumes(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    pool, words = ranks(4), words_for(inputs, *IDLE, "--train-iters", 4, "--lr-warmup-iters", 0)
    saved = [*words, "--save", str(tmp_path), "--load", str(tmp_path)]
    whole = pool.run(run_sft_words, words=words)
    first = pool.run(run_sft_words, words=[*saved, "--train-iters", "2"])
    second = pool.run(run_sft_words, words=saved)
    idle = [rank for rank in range(4) if not any("exp_avg" in name for name in whole[rank]["state"])]
    assert idle == [0, 1, 2]
    for rank in range(4):
        assert first[rank]["steps"] + second[rank]["steps"] == whole[rank]["steps"]
        assert second[rank]["state"] == whole[rank]["state"]
    assert losses(whole)[-1] < losses(whole)[0]


def test_a_finished_run_has_nothing_left_to_do(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    words = words_for(inputs, "--train-iters", 3, "--save", tmp_path, "--load", tmp_path)
    [done] = ranks(1).run(run_sft_words, words=words)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "iter_0000003").iterdir()}
    [again] = ranks(1).run(run_sft_words, words=words)
    assert again["steps"] == []
    assert {name: value for name, value in again["state"].items() if name != "learning rate"} == {
        name: value for name, value in done["state"].items() if name != "learning rate"
    }
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "iter_0000003").iterdir()} == before


def run_with_a_signal_while_it_exports(words: list[str]) -> dict[str, Any]:
    from hft_megatron.trainer.saving import Exporter

    export = Exporter.export_at_end

    def signalled(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        export(*arguments)

    with patch.object(Exporter, "export_at_end", signalled):
        return run_sft_words(words)


def test_a_signal_in_the_last_iteration_or_while_the_model_is_exported_lets_the_run_finish(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    words = words_for(inputs, "--train-iters", 3, "--save", tmp_path / "run", "--save-hf", tmp_path / "late")
    [late] = ranks(1).run(run_sft_words, words=words, kill_at=3)
    words = words_for(inputs, "--train-iters", 3, "--save-hf", tmp_path / "later")
    [later] = ranks(1).run(run_with_a_signal_while_it_exports, words=words)
    assert (late["stopped"], later["stopped"]) == (None, None)
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "3\n"
    assert all((tmp_path / name / "model.safetensors").exists() for name in ("late", "later"))
