"""Infinite and undefined numbers end a run with one sentence that says where they began, or their step is left out."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from hft_megatron.errors import RunFailed
from hft_megatron.model.parameters import parameter_slots
from hft_megatron.trainer import step
from hft_megatron.trainer.hooks import FEWEST, LossSpikes
from hft_megatron.trainer.loop import next_step, skip_iteration
from tests.support.models import LAYOUTS, make_llama
from tests.support.preferences import write_pairs
from tests.support.runs import Recorder, make_inputs, read_metrics, run_cli, run_recorded, state_of, words_for
from tests.support.toy_training import GLOBAL_BATCH, TINY, make_run

UP = "model.layers.3.mlp.up_proj"
"""On the second stage under PP 2."""
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 3000}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("nonfinite"))
    write_pairs(folder / "pairs.jsonl", 24)
    return folder


def of_unit(run: Any, unit: str) -> Iterator[tuple[torch.nn.Module, torch.nn.Parameter]]:
    for chunk in run.wrapped.modules:
        for slot in parameter_slots([chunk]):
            if slot.unit == unit:
                group = slot.local_name.removesuffix(".weight").rpartition(".")[0]
                yield chunk.get_submodule(group), slot.parameter


def undefined(module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A hook of the group of gate and up that spoils the output of up."""
    return (*output[:-1], output[-1] * float("nan"))


@contextlib.contextmanager
def planted(fault: str, run_of: Any, iterations: list[int], data_rank: int = 0) -> Iterator[None]:
    """Within it a number of those iterations is undefined: in ``data`` (of the second micro-batch, on one data-parallel
    rank), in the ``loss`` alone while gradients are finite, in an ``activation``, a ``gradient`` or a ``weight`` of
    ``UP``."""
    original, hooks = step.run_schedule, list[Any]()

    def spoiled(forward_step: Any, chunks: Any, batch: Any, *, forward_only: bool) -> Any:
        run = run_of()
        if run is None or run.state.iteration + 1 not in iterations or forward_only:
            return original(forward_step, chunks, batch, forward_only=forward_only)
        if fault == "data" and run.placement.data_rank == data_rank:
            second = batch.micro_batches[1]
            second["loss_mask"] = second["loss_mask"].clone().fill_(float("nan"))
        for module, parameter in of_unit(run, UP):
            if fault == "activation":
                # Until the end: the search runs the forward pass once more.
                hooks.append(module.register_forward_hook(undefined))
            if fault == "weight":
                parameter.data.view(-1)[5] = float("inf")
        reports = original(forward_step, chunks, batch, forward_only=forward_only)
        if fault == "loss" and reports:
            reports[0]["loss and tokens"][0] = float("inf")
        for _, parameter in of_unit(run, UP):
            if fault == "gradient":
                parameter.main_grad.fill_(float("nan"))
        return reports

    with patch.object(step, "run_schedule", spoiled):
        yield
    for hook in hooks:
        hook.remove()


def run_spoiled(method: str, words: list[str], fault: str, iterations: list[int]) -> dict[str, Any]:
    """What the run said at its end, and the steps before."""
    recorder = Recorder(kill_at=None, kill_rank=0)
    with planted(fault, lambda: recorder.run, iterations):
        try:
            answer = run_recorded(method, words, recorder)  # type: ignore[arg-type]
        except RunFailed as failure:
            answer = {"failed": str(failure), "steps": recorder.steps}
    return answer


WHERE = r"on rank {} on \S+ \(TP \d, PP {}, DP \d\)"
SAMPLES = ", ".join([r"\S+data\.jsonl:\d+"] * 4)
LAYOUT_WORDS = {
    "tp2": ["--tensor-model-parallel-size", "2"],
    "pp2": ["--pipeline-model-parallel-size", "2"],
    "dp2": [],
}
LAST_STAGE_FROZEN = ["--hft-freeze", "model.layers.2.*,model.layers.3.*,model.norm", "--hft-freeze-head"]
"""The rank that has the loss then has no gradients."""
CASES = [
    ("pp2", "activation", ["--bf16"]),
    ("pp2", "activation", ["--num-layers-per-virtual-pipeline-stage", "1"]),
    ("pp2", "gradient", ["--hft-ratio", "1"]),
    pytest.param("pp2", "loss", LAST_STAGE_FROZEN, marks=pytest.mark.engine),
    ("tp2", "activation", []),
    ("tp2", "weight", ["--bf16"]),
    ("dp2", "data", ["--hft-ratio", "1", "--bf16"]),
    ("dp2", "gradient", ["--hft-train", UP, "--overlap-grad-reduce", "--overlap-param-gather"]),
]


@pytest.mark.parametrize(("layout", "fault", "options"), CASES)
def test_an_undefined_number_is_told_by_iteration_rank_unit_and_samples_alike_on_all_ranks(
    ranks, inputs, layout, fault, options
):
    words = words_for(inputs, *LAYOUT_WORDS[layout], *options)
    first, second = ranks(2).run(run_spoiled, method="sft", words=words, fault=fault, iterations=[3])
    assert first["failed"] == second["failed"]
    assert [one["iteration"] for one in first["steps"]] == [1, 2]
    stage = rank = 1 if layout == "pp2" else 0
    where, any_rank = WHERE.format(rank, stage), WHERE.format("[01]", stage)
    summed = ", summed over data-parallel ranks," if layout == "dp2" else ""
    no_update = "so no update was made, which would have destroyed the model"
    unit, one = re.escape(UP), r"\S+data\.jsonl:\d+ and the losses"
    expected = {
        "activation": f"the loss of micro-batch 1 of 4 is not finite {where}, first in the output of {unit} {where}, "
        f"{no_update}; check {one}",
        "gradient": f"the gradient of {unit}{summed} is not finite {any_rank}, {no_update}; check {SAMPLES}",
        "loss": f"the loss of micro-batch 1 of 4 is not finite {where}, {no_update}; check {one}",
        "data": f"the loss of micro-batch 2 of 2 is not finite {where}, {no_update}; check {one}",
        "weight": f"the weight of {unit} is not finite since the step of iteration 2 {where}; resume from a checkpoint "
        "of an earlier iteration, with a lower --lr",
    }[fault]
    assert re.match(f"iteration 3: {expected}", first["failed"]), first["failed"]
    assert ("--skip-nonfinite-steps 1" in first["failed"]) == (fault != "weight")


def test_started_ranks_say_it_once_without_a_traceback_and_with_exit_code_1(inputs, tmp_path):
    words = words_for(inputs, *LAYOUT_WORDS["pp2"], "--lr", 1e30, "--lr-warmup-iters", 0, "--save", tmp_path / "run")
    log = tmp_path / "log"
    assert run_cli(words, ranks=2, log=log) == 1
    [sentence] = [line for line in log.read_text().splitlines() if line.startswith("hft-megatron: ")]
    assert re.match(
        rf"hft-megatron: error: iteration 2: the gradient of \S+ is not finite {WHERE.format(1, 1)}", sentence
    )
    assert "NonFiniteNorm" not in log.read_text(), "no traceback of a rank"
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["exit_code"], status["state"]) == (1, "failed")
    assert sentence == f"hft-megatron: {status['message']}"


def test_an_undefined_loss_of_a_pair_names_the_pair(ranks, inputs):
    words = words_for(inputs, "--train-data-path", inputs / "pairs.jsonl", "--lr", 1e-3, "--dpo-reference", "shared")
    [answer] = ranks(1).run(run_spoiled, method="dpo", words=words, fault="data", iterations=[2])
    assert re.match(
        r"iteration 2: the loss of micro-batch 2 of 4 is not finite .*; check \S+pairs\.jsonl:\d+ and the",
        answer["failed"],
    )


class Without:
    """Training steps without that of some samples, which come later by as many."""

    def __init__(self, steps: Any, bad: int) -> None:
        self._steps, self._bad, self.share = steps, bad, steps.share

    def step(self, consumed_samples: int) -> Any:
        return self._steps.step(consumed_samples + (GLOBAL_BATCH if consumed_samples >= self._bad else 0))


def run_steps(folder: str, layout: dict[str, Any], training: dict[str, Any], left_out: str) -> dict[str, Any]:
    """Six steps of which the third is left out, for its bad data or because it is asked for, or the five others alone:
    the bits after them, and what was said."""
    said: list[str] = []
    asked = {"iterations_to_skip": (3,)} if left_out == "asked" else {"skip_nonfinite_steps": 1}
    run = make_run(folder, layout, training={"micro_batch_size": 2, **asked, **training})
    run.announce = said.append
    if not left_out:
        run.batches = Without(run.batches, 2 * GLOBAL_BATCH)
    updated = []
    with planted("data", lambda: run, [3] if left_out else []):
        for _ in range(6 if left_out else 5):
            if run.is_to_skip:
                skip_iteration(run)
                updated.append(False)
            else:
                updated.append(next_step(run).updated)
    state = run.state
    return {
        "bits": state_of(run),
        "updated": updated,
        "state": [state.consumed_samples, list(state.skipped_iterations), list(state.asked_to_skip)],
        "said": said,
    }


LEFT_OUT = {
    "bad": (
        r"> iteration 3 is skipped \(1 of --skip-nonfinite-steps 1\): the loss of micro-batch 2 of \d is not finite "
        r".*; its samples are toy:\d+, toy:\d+$"
    ),
    "asked": r"> iteration 3 is skipped \(--iterations-to-skip\); its samples are toy:\d+.*$",
}


@pytest.mark.parametrize(("layout", "bf16"), [("pp2", False), ("dp2", True)])
def test_a_step_that_is_left_out_changes_not_a_bit_of_weights_moments_counts_and_rate(ranks, tmp_path, layout, bf16):
    folder = str(make_llama(tmp_path / "model", **TINY))
    options = LAYOUTS[layout] | (OVERLAP if layout == "dp2" else {})
    bad, asked, alone = (
        ranks(2).run(run_steps, folder=folder, layout=options, training={"bf16": bf16}, left_out=left_out)
        for left_out in ("bad", "asked", "")
    )
    for kind, found in {"bad": bad, "asked": asked}.items():
        for one, other in zip(found, alone, strict=True):
            assert len(one["bits"]) > 10
            assert one["bits"] == other["bits"]
            assert one["updated"] == [True, True, False, True, True, True]
            assert one["state"] == [6 * GLOBAL_BATCH, [3], [3] if kind == "asked" else []]
            [line] = one["said"]
            assert re.match(LEFT_OUT[kind], line)


@pytest.mark.slow
def test_the_count_of_skipped_steps_survives_a_resume_and_one_more_than_allowed_ends_the_run(ranks, inputs, tmp_path):
    words = words_for(inputs, "--skip-nonfinite-steps", 1, "--save", tmp_path, "--load", tmp_path, "--save-interval", 4)
    [whole] = ranks(1).run(run_spoiled, method="sft", words=words, fault="data", iterations=[3])
    assert [one["iteration"] for one in whole["steps"]] == [1, 2, 3, 4, 5, 6]
    metrics = read_metrics(tmp_path)
    assert [line["number of skipped iterations"] for line in metrics] == [0, 0, 1, 0, 0, 0]
    assert [line["number of nan iterations"] for line in metrics] == [0, 0, 1, 0, 0, 0]
    assert [line["iteration"] for line in metrics if "lm loss" not in line] == [3]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    for folder in tmp_path.glob("iter_0000006"):
        folder.rename(tmp_path / "later")
    [resumed] = ranks(1).run(run_spoiled, method="sft", words=words, fault="data", iterations=[])
    assert resumed["steps"] == whole["steps"][4:]
    assert resumed["state"] == whole["state"]
    for folder in tmp_path.glob("iter_0000006"):
        folder.rename(tmp_path / "again")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    [ended] = ranks(1).run(run_spoiled, method="sft", words=words, fault="data", iterations=[5])
    assert ended["steps"] == []
    assert "since all 1 of --skip-nonfinite-steps are used up, training may have diverged" in ended["failed"]


@pytest.mark.slow
def test_skipped_iterations_take_their_samples_on_a_resume_too_and_count_as_no_nonfinite_step(ranks, inputs, tmp_path):
    """Across rounds whose learning rate begins anew, where saving and validating stay at their multiples."""
    words = words_for(
        inputs, "--lr-decay-style", "linear", "--lr-warmup-iters", 0, "--valid-data-path", inputs / "data.jsonl"
    )
    words += ["--hft-round-interval", "3", "--hft-lr-schedule", "round", "--eval-interval", "2", "--save-interval", "2"]
    words += ["--skip-nonfinite-steps", "1", "--save", str(tmp_path), "--load", str(tmp_path)]
    skipping = [*words, "--iterations-to-skip", "2", "4"]
    [whole] = ranks(1).run(run_spoiled, method="sft", words=skipping, fault="data", iterations=[5])
    assert [one["iteration"] for one in whole["steps"]] == [1, 3, 5, 6]
    assert [one["consumed"] for one in whole["steps"]] == [4, 12, 20, 24]
    # Rounds are iterations 1 to 3 and 4 to 6; the rate waits for updates: 5e-3 x (1 - updates of the round / 3).
    assert [one["lr"] for one in whole["steps"]] == pytest.approx([5e-3, 5e-3 * 2 / 3, 5e-3, 5e-3])
    metrics = read_metrics(tmp_path)
    assert [line["iteration"] for line in metrics if "lm loss" in line or "grad norm" in line] == [1, 3, 6]
    assert [line["iteration"] for line in metrics if "lm loss validation" in line] == [2, 4, 6]
    assert [path.name for path in sorted(tmp_path.glob("iter_*"))] == [f"iter_000000{n}" for n in (2, 4, 6)]
    state = json.loads((tmp_path / "iter_0000006" / "train_state.json").read_text())
    assert (state["skipped_iterations"], state["asked_to_skip"]) == ([2, 4, 5], [2, 4])
    for resumed_at in ("4", "2"):
        for folder in tmp_path.glob("iter_000000*"):
            if folder.name > f"iter_000000{resumed_at}":
                folder.rename(tmp_path / f"was-{resumed_at}-{folder.name}")
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(resumed_at)
        coming = words if resumed_at == "4" else [*words, "--iterations-to-skip", "4"]
        [resumed] = ranks(1).run(run_spoiled, method="sft", words=coming, fault="data", iterations=[5])
        assert resumed["steps"] == [one for one in whole["steps"] if one["iteration"] > int(resumed_at)]
        assert resumed["state"] == whole["state"]


def run_saving_a_spoiled_weight(words: list[str]) -> str:
    recorder = Recorder(kill_at=None, kill_rank=0)

    def spoil(run: Any, result: Any) -> None:
        Recorder.after_step(recorder, run, result)
        if run.state.iteration == 2 and run.placement.rank == 1:
            next(parameter for _, parameter in of_unit(run, UP)).data.view(-1)[3] = float("nan")

    recorder.after_step = spoil  # type: ignore[method-assign]
    try:
        run_recorded("sft", words, recorder)
    except RunFailed as failure:
        return str(failure)
    return "no failure"


def test_weights_that_are_undefined_are_never_saved(ranks, inputs, tmp_path):
    words = words_for(inputs, *LAYOUT_WORDS["tp2"], "--save", tmp_path, "--save-interval", 1)
    first, second = ranks(2).run(run_saving_a_spoiled_weight, words=words)
    assert first == second
    assert re.match(rf"after iteration 2: the weight of {re.escape(UP)} is not finite {WHERE.format(1, 0)}; ", first)
    assert first.endswith(f"(the newest complete checkpoint is {tmp_path}/iter_0000001), with a lower --lr.")
    assert not (tmp_path / "iter_0000002").exists()


def test_a_spike_of_the_loss_is_told_by_median_and_deviation_and_only_with_enough_iterations() -> None:
    spikes = LossSpikes(8.0)
    assert [spikes.score(2.0 + 0.1 * (number % 3)) for number in range(FEWEST)] == [None] * FEWEST
    assert spikes.score(2.2) is None
    score = spikes.score(5.1)
    assert score == pytest.approx((5.1 - 2.1) / (1.4826 * 0.1))
    assert spikes.score(float("nan")) is None
    assert LossSpikes(None).score(1e9) is None


@pytest.mark.slow
def test_a_spike_is_in_the_record_of_its_iteration_whatever_the_interval(ranks, inputs, tmp_path):
    words = words_for(inputs, "--save", tmp_path, "--loss-spike-threshold", 1e-6, "--log-interval", 100)
    with_few = words_for(inputs, "--save", tmp_path / "few", "--loss-spike-threshold", 1e-6)
    ranks(1).run(run_spoiled, method="sft", words=[*words, "--train-iters", str(FEWEST + 3)], fault="", iterations=[])
    ranks(1).run(run_spoiled, method="sft", words=with_few, fault="", iterations=[])
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [FEWEST + 1, FEWEST + 2, FEWEST + 3]
    assert all(line["loss spike (robust z-score)"] > 1e-6 for line in read_metrics(tmp_path))
    assert not any("loss spike (robust z-score)" in line for line in read_metrics(tmp_path / "few"))
