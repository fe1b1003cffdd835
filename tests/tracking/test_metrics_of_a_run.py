"""metrics.jsonl of a real run has what dashboards and later runs read. Run: pytest tests/tracking"""

import math
from pathlib import Path
from statistics import mean

import pytest

from tests.support.event_files import scalars
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, read_metrics, run_sft_words, words_for, write_data

KEYS = {
    "iteration",
    "consumed samples",
    "lm loss",
    "learning rate",
    "grad norm",
    "elapsed time per iteration (ms)",
    "round",
    "plan digest",
    "trainable params",
    "frozen params",
    "global batch size",
    "compute time, median rank (ms)",
    "compute time, slowest rank (ms)",
    "forward time (ms)",
    "backward time (ms)",
    "reduce-scatter wait (ms)",
    "all-gather wait (ms)",
    "optimizer time (ms)",
    "reduce-scatter bytes",
    "all-gather bytes",
    "gradient buffer bytes",
    "master weight bytes",
    "moment bytes",
    "optimizer bytes",
    "throughput per GPU (TFLOP/s/GPU)",
    "actual throughput per GPU (TFLOP/s/GPU)",
    "tokens per GPU (tokens/s/GPU)",
    "max resident memory of the process (GB)",
    "time left (s)",
}


@pytest.mark.parametrize(
    "layout",
    [["--micro-batch-size", "2"], ["--pipeline-model-parallel-size", "2"], ["--tensor-model-parallel-size", "2"]],
    ids=["dp2", "pp2", "tp2"],
)
def test_every_iteration_is_one_line_with_every_key(layout: list[str], ranks: RankPools, tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    write_data(tmp_path / "valid.jsonl", 5)
    validation = ["--valid-data-path", tmp_path / "valid.jsonl", "--eval-interval", 2]
    words = words_for(inputs, "--train-iters", 3, "--save", tmp_path / "run", *validation, *layout)
    reports = ranks(2).run(run_sft_words, words=words)
    lines = read_metrics(tmp_path / "run")
    trained = [line for line in lines if "lm loss" in line]
    validated = [line for line in lines if "lm loss validation" in line]

    assert [line["iteration"] for line in trained] == [1, 2, 3]
    assert [line["iteration"] for line in validated] == [2, 3]
    assert all(set(line) - {"slowest rank"} == KEYS for line in trained)
    assert all(set(line) == {"iteration", "lm loss validation"} for line in validated)
    assert all(math.isfinite(line["lm loss validation"]) for line in validated)
    assert trained[-1]["time left (s)"] == 0 < trained[0]["time left (s)"]
    for line, step in zip(trained, reports[-1]["steps"], strict=True):
        # To the last digit: a resumed run is compared with these.
        assert line["lm loss"] == step["loss"]
        tokens = line["tokens per GPU (tokens/s/GPU)"] * 2 * line["elapsed time per iteration (ms)"] / 1e3
        assert tokens == pytest.approx(round(tokens), rel=1e-9)
        assert 4 * 20 < tokens < 4 * 96  # four examples, and no padding
        assert line["grad norm"] == step["grad_norm"]
        assert line["learning rate"] == step["lr"]
        assert line["consumed samples"] == step["consumed"] == 4 * step["iteration"]
    [digest] = {line["plan digest"] for line in trained}
    assert any(line.startswith(f"plan {digest}:") for line in reports[0]["said"])
    assert trained[0]["trainable params"] + trained[0]["frozen params"] == 178_624
    shares = (trained[0]["reduce-scatter bytes"] > 0, trained[0]["all-gather bytes"] > 0)
    assert shares == ((True, True) if "--micro-batch-size" in layout else (False, False))


def test_a_line_is_the_mean_over_its_log_interval_and_the_last_step_has_one(ranks: RankPools, tmp_path: Path) -> None:
    words = words_for(make_inputs(tmp_path), "--train-iters", 5, "--log-interval", 2, "--save", tmp_path / "run")
    words += ["--decoupled-lr", "1e-3"]
    [report] = ranks(1).run(run_sft_words, words=words)
    lines = read_metrics(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [2, 4, 5]
    losses = [step["loss"] for step in report["steps"]]
    means = [mean(losses[:2]), mean(losses[2:4]), losses[4]]
    assert [line["lm loss"] for line in lines] == means
    decoupled = [line["decoupled learning rate"] for line in lines]
    assert decoupled == pytest.approx([line["learning rate"] / 5 for line in lines]), "both follow one schedule"


@pytest.mark.parametrize(("interval", "steps"), [(2, [2, 4, 5]), (1, [1, 2, 3, 4, 5])])
def test_dashboards_can_have_an_interval_of_their_own(
    interval: int, steps: list[int], ranks: RankPools, tmp_path: Path
) -> None:
    folders = ["--save", tmp_path / "run", "--tensorboard-dir", tmp_path / "tb"]
    words = words_for(make_inputs(tmp_path), "--train-iters", 5, "--log-interval", 3, *folders)
    [report] = ranks(1).run(run_sft_words, words=[*words, "--tensorboard-log-interval", str(interval)])
    losses = [step["loss"] for step in report["steps"]]
    assert [line["iteration"] for line in read_metrics(tmp_path / "run")] == [3, 5]
    assert [line["lm loss"] for line in read_metrics(tmp_path / "run")] == [mean(losses[:3]), mean(losses[3:])]
    shown = scalars(tmp_path / "tb")["lm loss"]
    assert [step for step, _ in shown] == steps
    bounds = zip([0, *steps], steps, strict=False)
    assert [loss for _, loss in shown] == pytest.approx([mean(losses[a:b]) for a, b in bounds], rel=1e-6)
