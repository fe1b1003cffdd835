"""Estimated beside measured steps: the errors are those of the figures, and the program itself runs."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import step_time as bench
from machine_rates import seconds_of

from hft_megatron.costs.step_time import StepTime
from tests.support import forked
from tests.support.ranks import REPOSITORY

RATES = {
    "tflops": 0.05,
    "weight_gradient_tflops": 0.04,
    "attention_tflops": 0.02,
    "memory_bandwidth": 8.0,
    "node_bandwidth": 1.0,
}
SMALL = [
    *("--num-layers", "4"),
    *("--hidden-size", "64"),
    *("--num-attention-heads", "4"),
    *("--max-position-embeddings", "64"),
    *("--vocab-size", "1024"),
]


def step(milliseconds: float) -> StepTime:
    parts = dict.fromkeys(StepTime.__dataclass_fields__, 0.0)
    return StepTime(**{**parts, "forward": 0.25e-3 * milliseconds, "backward": 0.75e-3 * milliseconds})


def measured(*milliseconds: float) -> list[dict[str, float]]:
    return [{"step": one, "forward": one / 4} for one in milliseconds]


def test_an_error_is_the_estimate_over_the_mean_of_the_runs_and_so_is_that_of_half_over_full() -> None:
    found = bench.compared(
        {"HFT": measured(70.0, 90.0), "full": measured(100.0)}, {"HFT": step(88.0), "full": step(90.0)}
    )
    assert found["HFT"]["measured (ms)"] == {"step": 80.0, "forward": 20.0}
    assert found["HFT"]["estimated (ms)"]["backward"] == 66.0
    assert (found["HFT"]["error"], found["full"]["error"]) == (0.1, -0.1)
    assert found["HFT / full"] == {"measured": 0.8, "estimated": 0.9778, "error": 0.2222}
    lines = bench.render({"settings": {"DP 2": {**found, "rates": RATES}}}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["DP 2", "80 / 88", "+10 %", "100 / 90", "-10 %", "0.80 / 0.98", "+22 %"]
    assert cells[-1] == ["DP 2", "50.0", "40.0", "20.0", "8.00", "1.00"]


def test_a_run_and_its_estimate_have_the_same_options() -> None:
    for name, setting in bench.SETTINGS.items():
        options = bench.planned(setting, bench.MODEL)
        layout = f"{options.parallel.tensor_model_parallel_size} {options.parallel.pipeline_model_parallel_size}"
        assert {"DP": "1 1", "TP": "2 1", "PP": "1 2"}[name[:2]] == layout
        replicas = 2 if name.startswith("DP") else 1
        assert options.training.global_batch_size == setting.micro_batches * replicas
        assert f"{setting.sequence} tokens" in name
        estimated = bench.estimates(options, setting, RATES)
        assert 0.5 < estimated["HFT"].total / estimated["full"].total < 1


def test_the_first_of_several_rounds_is_not_timed() -> None:
    calls: list[str] = []
    seconds_of(lambda: calls.append("work"), lambda: calls.append("meet"), 2)
    assert calls == ["work", "meet", "work", "meet", "work"]


def test_the_committed_estimates_are_what_the_formula_says_now() -> None:
    committed = json.loads(bench.RESULTS.read_text(encoding="utf-8"))
    for name, found in committed["settings"].items():
        setting = bench.SETTINGS[name]
        estimated = bench.estimates(bench.planned(setting, committed["model"]), setting, found["rates"])
        runs = {method: [found[method]["measured (ms)"]] for method in estimated}
        again = bench.compared(runs, estimated)
        for method in estimated:
            assert again[method]["estimated (ms)"] == pytest.approx(found[method]["estimated (ms)"], abs=0.2)
        assert again["HFT / full"] == pytest.approx(found["HFT / full"], abs=2e-4)


def test_the_documentation_has_the_tables_of_the_committed_result() -> None:
    text = bench.DOCUMENT.read_text(encoding="utf-8")
    between = text.partition(bench.BEGIN)[2].partition(bench.END)[0]
    assert between.strip() == bench.render(json.loads(bench.RESULTS.read_text(encoding="utf-8")))


@pytest.mark.slow(reason="starts two ranks three times")
@pytest.mark.parametrize("exchange", ["data", "tensor", "pipeline"])
def test_rates_and_steps_are_measured_on_two_ranks(
    exchange: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bill

    def run_forked(command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path) -> None:
        assert command[0] == sys.executable
        assert folder == REPOSITORY
        done = forked.run(command[1:], tmp_path, environment=environment)
        assert done.returncode == 0, done.stderr

    for module in (bench, bill):
        monkeypatch.setattr(module, "run_logged", run_forked)
    monkeypatch.setattr(bench, "MEMORY_ELEMENTS", 1000)
    setting = bench.Setting(exchange=exchange, sequence=32, micro_batches=2, steps=3)
    found: dict[str, Any] = bench.measure({"toy": setting}, SMALL, 1)["settings"]["toy"]
    assert all(rate > 0 for rate in found["rates"].values())
    assert found["rates"].keys() == RATES.keys()
    for method in ("HFT", "full"):
        assert min(found[method][kind]["step"] for kind in ("measured (ms)", "estimated (ms)")) > 0
