"""The bill of real short runs: what is written and printed, and that it agrees with the log and with the formula."""

import json
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.costs.flops import FORMULA
from hft_megatron.costs.rank_costs import CostModel
from hft_megatron.hft.plan import make_plan
from hft_megatron.report.bill import render_bill
from hft_megatron.trainer.bill import announce_bill_of_stages, together, wire_bytes
from tests.support.runs import make_inputs, read_metrics, run_sft_words, words_for, write_data

STEPS = 5
SENT = ("reduced", "gathered")
PARTS = ("forward", "backward", "reduce-scatter wait", "all-gather wait", "optimizer", "other")
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", 20_000)


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    """Folders and announced lines of a half and a full run at DP 2, and a half run with overlap and validations."""
    root = tmp_path_factory.mktemp("bill")
    inputs = make_inputs(root)
    write_data(root / "valid.jsonl", 3)
    validation = ("--valid-data-path", root / "valid.jsonl", "--eval-interval", 4)
    options = {"half": (), "full": ("--hft-ratio", 1), "overlap": (*OVERLAP, *validation)}
    found = {}
    for name, words in options.items():
        save = root / name
        said = ranks(2).run(
            run_sft_words,
            words=words_for(inputs, "--train-iters", STEPS, "--micro-batch-size", 2, "--save", save, *words),
        )[0]["said"]
        found[name] = (save, said)
    return found


def bill_of(runs: dict[str, tuple[Path, list[str]]], name: str) -> dict[str, Any]:
    bill: dict[str, Any] = json.loads((runs[name][0] / "bill.json").read_text())
    return bill


@pytest.mark.parametrize("name", ["half", "full", "overlap"])
def test_the_bill_holds_every_rank_and_their_sum_over_the_steps_of_the_run(runs, name):
    bill = bill_of(runs, name)
    assert [bill[key] for key in ("first_iteration", "last_iteration", "steps", "timed_steps")] == [1, 5, 5, 3]
    assert [(rank["rank"], rank["data_rank"]) for rank in bill["ranks"]] == [(0, 0), (1, 1)]
    for item, total in bill["total_bytes"].items():
        assert total == {
            kind: sum(rank["bytes"][item][kind] for rank in bill["ranks"]) for kind in ("measured", "full")
        }
    assert bill["overlap_grad_reduce"] == bill["overlap_param_gather"] == (name == "overlap")


@pytest.mark.parametrize("name", ["half", "full", "overlap"])
def test_the_bill_is_the_sum_of_the_log(runs, name):
    lines = [line for line in read_metrics(runs[name][0]) if "lm loss" in line]
    measured = {item: value["measured"] for item, value in bill_of(runs, name)["ranks"][-1]["bytes"].items()}
    assert measured["reduced"] == sum(line["reduce-scatter bytes"] for line in lines) > 0
    assert measured["gathered"] == sum(line["all-gather bytes"] for line in lines) > 0
    # Half of every buffer stays with its rank of two.
    assert measured["wire"] == (measured["reduced"] + measured["gathered"]) / 2
    assert measured["gradients"] == lines[-1]["gradient buffer bytes"]
    assert measured["masters"] == lines[-1]["master weight bytes"] == 0
    assert measured["moments"] == lines[-1]["moment bytes"] == lines[-1]["optimizer bytes"]


@pytest.mark.parametrize("name", ["half", "full", "overlap"])
def test_the_throughput_of_the_bill_is_that_of_the_log_after_the_warm_up(runs, name):
    lines = [line for line in read_metrics(runs[name][0]) if "lm loss" in line][2:]
    bill = bill_of(runs, name)
    throughput = bill["throughput"]
    assert throughput.pop("formula") == FORMULA
    # The last rank's clock is in the log, and the first one's in the bill: of short steps they are far apart, while the
    # work that both divide by them is the same.
    milliseconds = bill["timed_steps"] * bill["ranks"][0]["milliseconds"]["step"]
    for rate, value in throughput.items():
        work = sum(line[rate] * line["elapsed time per iteration (ms)"] for line in lines)
        assert value * milliseconds == pytest.approx(work, rel=1e-3)
    model, actual = (throughput[f"{kind}throughput per GPU (TFLOP/s/GPU)"] for kind in ("", "actual "))
    assert actual == model if name == "full" else actual < model
    for rank in bill_of(runs, name)["ranks"]:
        assert 0.1 < rank["peak"]["max resident memory of the process (GB)"] < 100


def test_full_fine_tuning_costs_what_the_formula_says_and_half_costs_less(runs):
    full, half, overlap = (bill_of(runs, name)["total_bytes"] for name in ("full", "half", "overlap"))
    for item in ("reduced", "gathered", "gradients"):
        assert full[item]["measured"] == full[item]["full"] == half[item]["full"]
        assert half[item]["measured"] < overlap[item]["full"]
        # Only the vocabulary's matrices always train: 335 x 64 twice, of 178,624 parameters.
        assert 0.5 < half[item]["measured"] / half[item]["full"] < 0.7
    assert full["moments"]["measured"] == full["moments"]["full"] == 8 * 178_624
    assert full["masters"] == {"measured": 0, "full": 0}


@pytest.mark.parametrize("name", ["half", "full", "overlap"])
def test_no_part_of_a_step_takes_longer_than_the_step_and_together_they_are_the_step(runs, name):
    for rank in bill_of(runs, name)["ranks"]:
        times = rank["milliseconds"]
        assert set(times) == {"step", *PARTS}
        assert all(0 < times[part] <= times["step"] for part in PARTS)
        assert sum(times[part] for part in PARTS) == pytest.approx(times["step"])
    for line in read_metrics(runs[name][0]):
        if "lm loss" in line:
            parts = sum(line[f"{part} (ms)"] for part in ("reduce-scatter wait", "all-gather wait"))
            parts += sum(line[f"{part} time (ms)"] for part in ("forward", "backward", "optimizer"))
            assert 0 < parts <= line["elapsed time per iteration (ms)"]


def test_the_table_is_printed_at_the_end(runs):
    [table] = [line for line in runs["half"][1] if line.startswith("> the bill")]
    assert table.startswith("> the bill of iterations 1 to 5, measured on TP 1 x PP 1 x DP 2;")
    assert render_bill(bill_of(runs, "half")) == table


def test_a_finished_run_that_is_started_again_keeps_its_bill(runs, ranks):
    save, _ = runs["half"]
    before = (save / "bill.json").read_text()
    words = words_for(save.parent, "--train-iters", STEPS, "--micro-batch-size", 2, "--save", save, "--load", save)
    [said, _] = [report["said"] for report in ranks(2).run(run_sft_words, words=words)]
    assert not [line for line in said if line.startswith("> the bill")]
    assert (save / "bill.json").read_text() == before


def account(measured: int, full: int, milliseconds: float) -> dict[str, Any]:
    items = ("reduced", "gathered", "wire", "gradients", "masters", "moments", "resting")
    return {
        "bytes": {item: {"measured": measured, "full": full} for item in items},
        "milliseconds": dict.fromkeys(("step", *PARTS), milliseconds),
    }


def test_a_table_shows_the_largest_rank_the_sum_and_the_share():
    total = {"measured": 3_000_000, "full": 8_000_000}
    bill = {
        "first_iteration": 11,
        "last_iteration": 14,
        "steps": 4,
        "timed_steps": 2,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 2,
        "data_parallel_size": 1,
        "overlap_grad_reduce": True,
        "overlap_param_gather": False,
        "total_bytes": dict.fromkeys(("reduced", "gathered", "wire", "gradients", "moments"), total)
        | {"masters": {"measured": 0, "full": 0}, "resting": {"measured": 40_000, "full": 0}},
        "throughput": {"tokens per GPU (tokens/s/GPU)": 1234.56, "formula": "6 N"},
        "switches": {"count": 3, "mean_ms": 12.34},
        "ranks": [
            account(2_000_000, 3_000_000, 10.0) | {"peak": {"max allocated memory (GB)": 70.0}},
            account(1_000_000, 5_000_000, 20.0) | {"peak": {"max allocated memory (GB)": 60.0}},
        ],
    }
    lines = render_bill(bill).splitlines()[1:]
    rows = {label: cells.split() for label, _, cells in (line.strip().partition("  ") for line in lines)}
    assert len({len(line) for line in lines if line.endswith(("%", "-", "share"))}) == 1  # one width
    assert rows["reduced per step"] == ["500.0", "kB", "1.2", "MB", "750.0", "kB", "2.0", "MB", "37.5%"]
    assert rows["sent to other ranks per step"] == rows["reduced per step"]
    assert rows["held as moments"] == ["2.0", "MB", "5.0", "MB", "3.0", "MB", "8.0", "MB", "37.5%"]
    assert rows["held as masters"][-1] == "-"
    assert rows["kept on the host"][-3:] == ["0", "bytes", "-"]
    assert rows["ms per switch, mean of 3"] == ["12.3"]
    assert rows["tokens per GPU (tokens/s/GPU)"] == ["1,234.6"]
    assert rows["max allocated memory (GB)"] == ["65.00", "60.00", "70.00"]
    assert "6 N" not in render_bill(bill)
    assert rows["reduce-scatter wait (exposed)"] == rows["all-gather wait (all of it)"] == ["15.0", "10.0", "20.0"]


def test_a_rank_sends_all_parts_of_a_buffer_but_its_own() -> None:
    assert [wire_bytes(1200, ranks) for ranks in (1, 2, 3, 8)] == [0, 600, 800, 1050]


def test_bills_of_stages_add_up_what_was_sent_and_weigh_times_by_their_steps(runs, tmp_path):
    half, full = (bill_of(runs, name) for name in ("half", "full"))
    both = together([half, full | {"timed_steps": 9}])
    assert (both["steps"], both["timed_steps"]) == (10, 12)
    for name in ("reduced", "moments"):
        one, other = (bill["total_bytes"][name]["measured"] for bill in (half, full))
        assert both["total_bytes"][name]["measured"] == (one + other if name == "reduced" else max(one, other))
    for number, rank in enumerate(both["ranks"]):
        one, other = (bill["ranks"][number]["milliseconds"]["step"] for bill in (half, full))
        assert rank["milliseconds"]["step"] == pytest.approx((3 * one + 9 * other) / 12)
        assert sum(rank["milliseconds"][part] for part in PARTS) == pytest.approx(rank["milliseconds"]["step"])
    said = []
    folders = [runs[name][0] for name in ("overlap", "half", "full")]
    damaged = {"torn": '{"steps": 5', "empty": "{}", "no bill": "[]"}
    for name, text in damaged.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "bill.json").write_text(text)
    announce_bill_of_stages([*folders, tmp_path / "left none", *(tmp_path / name for name in damaged)], said.append)
    [table] = said
    assert table.startswith("> the bill of 2 of 7 stages, measured on TP 1 x PP 1 x DP 2;")


def test_a_bill_that_cannot_be_written_is_a_line_of_the_log_and_the_export_follows(ranks, tmp_path):
    inputs, save = make_inputs(tmp_path / "inputs"), tmp_path / "run"
    (save / "bill.json").mkdir(parents=True)
    words = words_for(inputs, "--train-iters", 3, "--save", save, "--save-hf", tmp_path / "out")
    said = ranks(2).run(run_sft_words, words=words)[0]["said"]
    [line] = [line for line in said if "could not be written" in line]
    assert line.startswith("> the bill could not be written: [Errno 21] Is a directory: ")
    assert (tmp_path / "out" / "config.json").exists()


def test_over_rounds_the_bill_has_what_was_held_at_one_time_and_what_was_kept_on_the_host(ranks, tmp_path):
    """On two stages HiFT's groups train in turn: each stage's most added up was never held together."""
    inputs = make_inputs(tmp_path / "inputs")
    options = [
        "--pipeline-model-parallel-size",
        2,
        "--lr-warmup-iters",
        0,
        "--hft-round-interval",
        2,
        "--train-iters",
        6,
    ]
    hift = ["--hft-selection", "hift", "--hft-ratio", 0.3, "--hft-moments", "carry", "--hft-frozen-moments", "host"]
    save = tmp_path / "run"
    ranks(2).run(run_sft_words, words=words_for(inputs, *options, *hift, "--save", save))
    bill = json.loads((save / "bill.json").read_text())
    shape = ModelShape.from_hf_config(load_hf_config(str(inputs / "model")), "model")
    model = CostModel(shape=shape, parallel=ParallelConfig(pipeline_model_parallel_size=2), world_size=2, bf16=False)
    config = HFTConfig(hft_selection="hift", hft_ratio=0.3)
    plans = [make_plan(shape, config, default_seed=1234, round=round) for round in range(3)]
    held = [[model.stage_costs(plan.trains, stage)[0].gradient_bytes for stage in (0, 1)] for plan in plans]
    assert bill["rounds"] == [0, 1, 2]
    assert bill["total_bytes"]["gradients"]["measured"] == max(map(sum, held))
    assert [rank["bytes"]["gradients"]["measured"] for rank in bill["ranks"]] == [
        max(stage) for stage in zip(*held, strict=True)
    ]
    assert max(map(sum, held)) < sum(max(stage) for stage in zip(*held, strict=True))
    earlier = {name for plan in plans[:2] for name in plan.training}
    kept = sum(unit.parameters for unit in plans[0].units if unit.name in earlier - plans[2].training)
    assert bill["total_bytes"]["resting"]["measured"] == 8 * kept > 0
    assert bill["switches"]["count"] == 2
