"""The benchmark's summary and table say what the runs' bills say, and the benchmark itself runs."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bill as bench
import pytest
from bill_summary import render, summarise

from hft_megatron.costs.rank_memory import in_bytes
from hft_megatron.report.bill import BYTE_ROWS
from tests.support import forked

REPOSITORY = Path(__file__).resolve().parents[2]


def bill(milliseconds: list[float], reduced: int, steps: int = 4) -> dict[str, Any]:
    """One entry of ``milliseconds`` per rank; other bytes follow from ``reduced``, masters are none."""
    held = {"measured": reduced // 2, "full": 0}
    return {
        "bf16": False,
        "steps": steps,
        "trainable_parameters": 30,
        "frozen_parameters": 70,
        "total_bytes": {
            "reduced": {"measured": reduced * steps, "full": 0},
            "gathered": {"measured": reduced * steps // 2, "full": 0},
            "wire": {"measured": reduced * steps * 3 // 4, "full": 0},
            "gradients": held,
            "masters": {"measured": 0, "full": 0},
            "moments": held,
        },
        "ranks": [{"milliseconds": {"step": one, "forward": one / 4}} for one in milliseconds],
    }


BILLS = {
    "HFT": [bill([10.0, 20.0], 2_000_000), bill([30.0, 30.0], 2_000_000), bill([20.0, 20.0], 2_000_000)],
    "full": [bill([30.0, 30.0], 4_000_000), bill([40.0, 40.0], 4_000_000), bill([50.0, 50.0], 4_000_000)],
}


def test_a_ratio_is_taken_within_each_pair_and_a_run_is_the_mean_of_its_ranks() -> None:
    found = summarise(BILLS)
    assert found["HFT"]["milliseconds"]["step"] == {"median": 20.0, "least": 15.0, "most": 30.0}
    assert found["full"]["milliseconds"]["forward"] == {"median": 10.0, "least": 7.5, "most": 12.5}
    # 15 / 30, 30 / 40, 20 / 50
    assert found["milliseconds HFT / full"]["step"] == {"median": 0.5, "least": 0.4, "most": 0.75}
    assert found["HFT"]["bytes"] == {
        "reduced": 2e6,
        "gathered": 1e6,
        "wire": 1.5e6,
        "gradients": 1_000_000,
        "masters": 0,
        "moments": 1_000_000,
    }
    assert (found["full"]["trained parameters"], found["full"]["parameters"]) == (30, 100)


def test_runs_of_one_method_that_sent_different_bytes_are_no_result() -> None:
    with pytest.raises(AssertionError, match="different bytes"):
        summarise({**BILLS, "HFT": [*BILLS["HFT"][:2], bill([20.0, 20.0], 2_000_128)]})


def test_the_table_has_a_column_per_configuration() -> None:
    one = {"model": "demo", "overlap": "off", **summarise(BILLS)}
    lines = render({"configurations": [one, {**one, "overlap": "on"}]}).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert cells["HFT / full"] == ["demo, overlap off, fp32", "demo, overlap on, fp32"]
    assert cells["step (ms)"] == ["20 / 40 = 0.50 (0.40 to 0.75)"] * 2
    assert cells["reduce-scattered per step, all ranks (MB)"] == ["2.0 / 4.0 = 0.50"] * 2
    assert cells["held as master weights, all ranks (MB)"] == ["none"] * 2


def test_the_program_shows_the_committed_result() -> None:
    program = REPOSITORY / "tools" / "bench" / "bill.py"
    done = subprocess.run([sys.executable, program, "--render"], check=True, capture_output=True, text=True)
    assert done.stdout == f"{render(json.loads(bench.RESULTS.read_text()))}\n"


def test_the_bill_in_the_documentation_has_the_bytes_of_the_committed_result() -> None:
    page = (REPOSITORY / "docs/plan_and_bill.md").read_text(encoding="utf-8")
    first = json.loads(bench.RESULTS.read_text())["configurations"][0]
    assert (first["model"], first["data type"]) == ("demo", "bf16")
    half, full = first["HFT"]["bytes"], first["full"]["bytes"]
    for name, label in BYTE_ROWS:
        [row] = re.findall(rf"^  {label}  +(.*)$", page, re.MULTILINE)
        sizes = [in_bytes(of[name] / ranks) for ranks in (bench.RANKS, 1) for of in (half, full)]
        share = f"{half[name] / full[name]:.1%}" if full[name] else "-"
        assert re.split(" {2,}", row) == [*sizes, share], label


@pytest.mark.slow
def test_the_benchmark_runs_both_methods_on_ranks_and_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_forked(command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path) -> None:
        assert command[0] == sys.executable
        assert folder == REPOSITORY
        done = forked.run(command[1:], tmp_path, environment=environment)
        assert done.returncode == 0, done.stderr

    output = tmp_path / "bill.json"
    words = ["--model", "demo", "--overlap", "on", "--steps", "2", "--pairs", "1", "--output", str(output)]
    monkeypatch.setattr(bench, "run_logged", run_forked)
    monkeypatch.setattr(sys, "argv", ["bill.py", *words])
    assert bench.main() == 0
    results = json.loads(output.read_text())
    [configuration] = results["configurations"]
    assert configuration["HFT"]["trained parameters"] < configuration["full"]["trained parameters"]
    assert 0 < configuration["HFT"]["bytes"]["reduced"] < configuration["full"]["bytes"]["reduced"]
    assert configuration["full"]["trained parameters"] == configuration["full"]["parameters"]
