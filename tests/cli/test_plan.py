"""``hft-megatron plan``: grid, costs, files and mistakes. Run: pytest tests/cli/test_plan.py"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hft_megatron import errors
from hft_megatron.cli import main
from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.costs.part_times import Device
from hft_megatron.costs.rank_costs import CostModel
from hft_megatron.costs.rank_memory import MicroBatch
from hft_megatron.costs.step_time import StepTimeModel
from hft_megatron.hft.plan import Plan, make_plan
from hft_megatron.hft.plan_file import load_plans
from hft_megatron.report.plan import make_report
from hft_megatron.report.plan_picture import FROZEN, ROUND_COLOURS, strip, unit_boxes
from hft_megatron.report.plan_text import report_text
from tests.cli.conftest import SHAPE

LLAMA_70B = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
WITHOUT_TORCH = """
import json, resource, sys
from hft_megatron.cli import main
code = main(sys.argv[1:])
heavy = sorted({"torch", "megatron", "transformers", "PIL"} & sys.modules.keys())
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"code": code, "heavy": heavy, "seconds": used.ru_utime + used.ru_stime}), file=sys.stderr)
"""

Run = Callable[..., str]


@pytest.fixture
def plan(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """What ``hft-megatron plan --load-hf MODEL`` with these words prints; it must end well."""

    def run(*words: str) -> str:
        assert main(["plan", "--load-hf", str(model_folder), *words]) == errors.EXIT_OK
        return capsys.readouterr().out

    return run


def plans(rounds: int = 1, seed: int = 1234, **options: Any) -> list[Plan]:
    return [make_plan(SHAPE, HFTConfig(**options), default_seed=seed, round=round) for round in range(rounds)]


def grid_rows(text: str) -> dict[str, list[str]]:
    """Cells after the label of every row of the grid, by label (``embedding``, ``3``)."""
    lines = text.split("\n\n")[3].splitlines()[2:]
    labels = {line[:16].removeprefix("PP").split()[-1]: line[16:].split() for line in lines}
    return labels


def test_70b_on_1024_ranks_takes_less_than_two_seconds_and_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    layout = ["--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "4", "--world-size", "1024"]
    words = ["plan", "--load-hf", str(tmp_path), *layout, "--overlap-grad-reduce", "--rounds", "2", "--json"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True, text=True, check=True)
    outcome = json.loads(done.stderr)
    assert (outcome["code"], outcome["heavy"]) == (0, [])
    assert outcome["seconds"] < 2  # of this process alone, however busy the machine is
    report = json.loads(done.stdout)
    for costs in [*report["rounds"], report["full_fine_tuning"]]:
        assert [rank["rank"] for rank in costs["ranks"]] == list(range(1024))


def test_keys_of_the_config_that_nobody_knows_are_named_as_a_run_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B | {"mystery": 1, "pretraining_tp": 2}))
    note = f"{tmp_path}/config.json: unknown keys are ignored: mystery (LLaMA is computed without them)"
    assert main(["plan", "--load-hf", str(tmp_path)]) == errors.EXIT_OK
    assert capsys.readouterr().out.splitlines()[0] == note
    assert main(["plan", "--load-hf", str(tmp_path), "--json"]) == errors.EXIT_OK
    assert json.loads(capsys.readouterr().out)["notes"] == [note]


def test_the_grid_has_every_unit_at_its_place(plan: Run) -> None:
    text = plan("--rounds", "2", "--pipeline-model-parallel-size", "2", "--hft-freeze-head", "--hft-train", "*.3.*")
    drawn = plans(2, hft_freeze_head=True, hft_train="*.3.*")
    rows = grid_rows(text)
    assert rows["embedding"] == rows["norm"] == ["#", "#"]
    assert rows["lm_head"] == [".", "."]
    assert rows["3"] == ["####", "###", "##"] * 2
    modules = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    modules += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    for layer in range(SHAPE.num_layers):
        marks = ["".join("#" if p.trains(f"model.layers.{layer}.{m}") else "." for m in modules) for p in drawn]
        assert "".join(rows[str(layer)]) == "".join(marks)


def test_layers_stand_beside_their_pipeline_stage_also_when_stages_interleave(plan: Run) -> None:
    text = plan("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "2")
    stages = [line.split()[1] for line in text.split("\n\n")[3].splitlines() if line.startswith("PP")]
    assert stages == ["0", "0", "1", "1", "0", "0", "1", "1"]


def test_uneven_stages_stand_beside_their_layers_in_text_json_and_picture(plan: Run, tmp_path: Path) -> None:
    words = ["--pipeline-model-parallel-size", "3", "--decoder-first-pipeline-num-layers", "4"]
    text = plan(*words, "--png", str(tmp_path / "uneven.png"))
    assert "TP 1 x PP 3 (4 + 2 x 2 layers) x DP 1, world size 3" in text
    stages = [line.split()[1] for line in text.split("\n\n")[3].splitlines() if line.startswith("PP")]
    assert stages == ["0", "0", "0", "0", "1", "1", "2", "2"]
    report = json.loads(plan(*words, "--json"))
    assert report["layout"]["layers_per_stage"] == [4, 2, 2]
    assert [str(layer["pp"]) for layer in report["rounds"][0]["layers"]] == stages
    plan("--pipeline-model-parallel-size", "4", "--png", str(tmp_path / "even.png"))
    even, uneven = (Image.open(tmp_path / f"{name}.png").tobytes() for name in ("even", "uneven"))
    assert uneven != even


def test_the_smallest_layouts_may_have_uneven_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_70B, "num_hidden_layers": 79}))
    words = ["--tensor-model-parallel-size", "8", "--seq-length", "2048", "--memory", "80GB", "--json"]
    assert main(["plan", "--load-hf", str(tmp_path), *words]) == errors.EXIT_OK
    proposed = json.loads(capsys.readouterr().out)["memory"]["full"]["smallest_layouts"]
    assert proposed[0]["words"] == "TP 8 x PP 2 x DP 2 with --decoder-first-pipeline-num-layers 40"
    layout = ["--pipeline-model-parallel-size", "2", "--world-size", "32", "--decoder-first-pipeline-num-layers", "40"]
    assert main(["plan", "--load-hf", str(tmp_path), *words, *layout]) == errors.EXIT_OK
    full = json.loads(capsys.readouterr().out)["memory"]["full"]
    assert (full["fits"], full["total"]) == (True, proposed[0]["total"])


def test_rounds_that_fill_a_line_continue_below(plan: Run) -> None:
    text = plan("--rounds", "20")
    headings = [line.split("round ")[1:] for line in text.splitlines() if line.strip().startswith("round 0  ")]
    assert headings
    assert max(len(line) for line in text.split("\n\n")[3].splitlines()) <= 100
    shown = [int(n) for line in text.splitlines() if line.startswith("   ") for n in line.split("round ")[1:]]
    assert shown == list(range(20))


def test_text_has_realised_ratios_by_matrices_and_by_parameters(plan: Run) -> None:
    seed = next(seed for seed in range(99) if plans(seed=seed)[0].counts()[0].parameter_ratio != 0.5)
    attention = plans(seed=seed)[0].counts()[0]
    assert attention.unit_ratio == 0.5  # the ratios differ under grouped-query attention
    [line] = [line for line in plan("--seed", str(seed)).splitlines() if line.startswith("  attention")]
    assert "16 of 32 units train (50.0%)" in line
    assert f"({attention.parameter_ratio:.1%})" in line


def test_json_has_digest_rounds_and_the_costs_of_every_rank_against_full_fine_tuning(plan: Run) -> None:
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    words = [word for name, size in layout.items() for word in (f"--{name.replace('_', '-')}", str(size))]
    report = json.loads(plan(*words, "--world-size", "16", "--rounds", "3", "--no-bf16", "--json"))
    drawn = plans(3)
    assert report["digest"] == drawn[0].digest
    assert [one["digest"] for one in report["rounds"]] == [one.digest for one in drawn]
    model = CostModel(shape=SHAPE, parallel=ParallelConfig(**layout), world_size=16, bf16=False)
    everything = [(one.trains, shown["ranks"]) for one, shown in zip(drawn, report["rounds"], strict=True)]
    for trains, ranks in [*everything, (lambda unit: True, report["full_fine_tuning"]["ranks"])]:
        places = [(rank.pop("rank"), rank.pop("tp"), rank.pop("dp"), rank.pop("pp")) for rank in ranks]
        # megatron-core's order: tensor ranks are neighbours, stages are far apart.
        assert places == [(n, n % 2, n // 2 % 4, n // 8) for n in range(16)]
        assert ranks == [asdict(model.stage_costs(trains, n // 8)[n // 2 % 4]) for n in range(16)]


def test_the_digest_is_the_same_for_every_layout(plan: Run) -> None:
    layouts = [[], ["--tensor-model-parallel-size", "4"], ["--pipeline-model-parallel-size", "8", "--world-size", "32"]]
    layouts.append(["--pipeline-model-parallel-size", "3", "--decoder-last-pipeline-num-layers", "2"])
    assert len({json.loads(plan(*layout, "--json"))["digest"] for layout in layouts}) == 1


def table(text: str) -> list[list[str]]:
    """Cells of the last table's rows, without its title and heading."""
    return [re.split("  +", line.strip()) for line in text.split("\n\n")[-1].splitlines()[2:]]


def test_the_table_shows_shares_of_full_fine_tuning(plan: Run) -> None:
    model = CostModel(shape=SHAPE, parallel=ParallelConfig(), world_size=2, bf16=True)
    [half, _] = model.stage_costs(plans()[0].trains, 0)
    [full, _] = model.stage_costs(lambda unit: True, 0)
    stage, numbers, *cells = table(plan("--world-size", "2"))[0]
    shares = [f"({one / whole:.1%})" for one, whole in zip(astuple(half), astuple(full), strict=True)]
    assert (stage, numbers) == ("PP 0", "0")  # rank 1 has the padding
    assert [cell.split()[-1] for cell in cells] == shares
    assert f"{half.trainable_parameters:,} {shares[0]}" == cells[0]
    assert f"{half.gradient_bytes / 1e3:.2f} kB {shares[1]}" == cells[1]


def test_the_table_groups_data_parallel_ranks_of_equal_costs_and_shows_the_largest_of_many_kinds(plan: Run) -> None:
    rows = table(plan("--world-size", "512", "--hft-ratio", "1"))
    assert [row[:2] for row in rows[:2]] == [["PP 0", "0-510"], ["PP 0", "511"]]
    ragged = replace(SHAPE, hidden_size=40, ffn_hidden_size=88, vocab_size=301)  # no size is a multiple of 64
    full = make_plan(ragged, HFTConfig(hft_ratio=1.0), default_seed=1)
    report = make_report([full], CostModel(shape=ragged, parallel=ParallelConfig(), world_size=384, bf16=True))
    kinds = {rank.optimizer_bytes for rank in report.full[0]}
    assert len(kinds) > 4
    [row, _] = table(report_text(report))
    assert row[:2] == ["PP 0", "0-383, at most"]
    assert row[4] == f"{max(kinds) / 1e3:.2f} kB (100.0%)"


def test_saved_plans_are_what_hft_plan_reads_and_a_plan_drawn_from_them_is_the_same(plan: Run, tmp_path: Path) -> None:
    file = str(tmp_path / "plan.json")
    words = ["--rounds", "3", "--hft-rotation", "complementary", "--save", file]
    printed = plan(*words)
    assert list(load_plans(file, SHAPE)) == plans(3, hft_rotation="complementary")
    assert plan("--hft-plan", file) == printed
    assert plan(*words) == printed  # the same plan may be saved again
    first = json.loads(plan("--hft-plan", file, "--rounds", "1", "--json"))
    assert [one["round"] for one in first["rounds"]] == [0]


def test_rounds_are_counted_from_the_first_that_is_asked_for(plan: Run) -> None:
    words = ("--hft-rotation", "complementary", "--hft-first-round", "1", "--rounds", "2", "--json")
    drawn = [make_plan(SHAPE, HFTConfig(hft_rotation="complementary"), default_seed=1234, round=n) for n in (1, 2)]
    assert [one["digest"] for one in json.loads(plan(*words))["rounds"]] == [one.digest for one in drawn]


def test_an_edited_plan_is_never_written_over(
    plan: Run, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    plan("--save", str(file))
    edited = file.read_text().replace('"trains": true', '"trains": false', 1)
    file.write_text(edited)
    assert main(["plan", "--load-hf", str(model_folder), "--save", str(file)]) == errors.EXIT_USAGE
    assert f"--save {file} already exists with other contents" in capsys.readouterr().err
    assert file.read_text() == edited


def test_the_picture_colours_what_trains_in_a_round_and_greys_what_is_frozen(plan: Run, tmp_path: Path) -> None:
    file = tmp_path / "plan.png"
    plan("--rounds", "3", "--hft-freeze-head", "--png", str(file))
    drawn = plans(3, hft_freeze_head=True)
    model = CostModel(shape=SHAPE, parallel=ParallelConfig(), world_size=1, bf16=True)
    boxes = unit_boxes(make_report(drawn, model))
    with Image.open(file) as image:
        for unit, box in boxes.items():
            for index, one in enumerate(drawn):
                left, top, right, bottom = strip(box, index, 3)
                expected = ROUND_COLOURS[index] if one.trains(unit) else FROZEN
                corners = [(left, top), (right - 1, bottom - 1)]
                assert [image.getpixel(corner) for corner in corners] == [expected] * 2, (unit, index)
    assert boxes["lm_head"][1] > boxes["model.norm"][1] > boxes["model.layers.7.mlp.up_proj"][1]


def test_the_file_of_a_run_serves_a_plan_and_its_other_options_are_passed_over(plan: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "lr: 1e-4\nsave: run\ntraining:\n  micro_batch_size: 4\n  seed: 7\n  bf16: false\nhft_ratio: 0.25\n"
    )
    report = json.loads(plan("--config", str(file), "--json"))
    assert report["digest"] == plans(seed=7, hft_ratio=0.25)[0].digest
    assert report["layout"]["bf16"] is False
    assert not (tmp_path / "run").exists()


def planned_70b(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the plan of LLaMA 70B at TP 8 x DP 16 prints with these words."""
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    layout = ["--tensor-model-parallel-size", "8", "--world-size", "128", "--seq-length", "2048"]
    assert main(["plan", "--load-hf", str(folder), *layout, *words]) == errors.EXIT_OK
    return capsys.readouterr().out


def test_half_of_70b_needs_39_gb_before_activations_and_full_59(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = planned_70b(tmp_path, capsys, "--memory", "80GB", "--micro-batch-size", "2")
    memory = {line[:22].strip(): line[22:].split() for line in text.split("\n\n")[-1].splitlines()}
    assert memory["before activations"] == ["39.5", "GB", "59.5", "GB"]
    parts = ("before activations", "activations", "logits")
    for column in (0, 2):
        *sizes, total = (
            float(memory[row][column]) * {"MB": 1e-3, "GB": 1}[memory[row][column + 1]] for row in (*parts, "total")
        )
        assert total == pytest.approx(sum(sizes), abs=0.2)
    assert "the plan fits into 80.0 GB" in text
    assert "full fine-tuning does not fit into 80.0 GB" in text


def test_what_is_proposed_where_a_plan_does_not_fit_is_named_once_and_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--memory", "80GB", "--micro-batch-size", "4"]
    text = planned_70b(tmp_path, capsys, *words)
    assert text.count("does not fit into 80.0 GB") == 2
    assert "  it fits with --sequence-parallel (" in text
    proposed = [line for line in text.splitlines() if line.startswith("  it fits with ")]
    assert len(set(proposed)) == len(proposed)
    assert "the plan fits into 80.0 GB" in planned_70b(tmp_path, capsys, *words, "--sequence-parallel")


def test_the_memory_in_json_has_every_part_and_a_smallest_layout_that_fits_where_half_of_it_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--memory",
        "80GB",
        "--recompute-granularity",
        "full",
        "--recompute-method",
        "uniform",
        "--recompute-num-layers",
        "1",
    ]
    memory = json.loads(planned_70b(tmp_path, capsys, *words, "--json"))["memory"]
    assert (memory["device_bytes"], memory["micro_batch_size"], memory["seq_length"]) == (80 * 10**9, 1, 2048)
    for judged in (memory["plan"], memory["full"]):
        assert judged["fits"]
        assert judged["options"] == []
        assert judged["total"] == sum(
            judged[name] for name in ("weights", "gradients", "optimizer", "activations", "logits")
        )
    [smallest, *_] = memory["plan"]["smallest_layouts"]
    assert smallest["words"] == "TP 8 x PP 1 x DP 2"
    assert memory["full"]["smallest_layouts"][0]["words"] == "TP 8 x PP 2 x DP 2"
    half_the_ranks = ["--tensor-model-parallel-size", "8", "--world-size", "8", "--seq-length", "2048"]
    assert main(["plan", "--load-hf", str(tmp_path), *half_the_ranks, *words, "--json"]) == errors.EXIT_OK
    assert not json.loads(capsys.readouterr().out)["memory"]["plan"]["fits"]


def test_where_nothing_helps_the_plan_says_so(plan: Run) -> None:
    text = plan("--memory", "0.01MB", "--micro-batch-size", "2")
    assert text.count("neither recomputation nor a smaller micro-batch makes it fit") == 2
    assert text.count("with these options it fits in no layout") == 2


def test_the_data_type_that_a_run_here_would_choose_is_said(plan: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from hft_megatron.engine import cpu_backend

    for fast, dtype in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(cpu_backend, "cpu_has_fast_bf16", lambda fast=fast: fast)
        assert (
            plan("--memory", "1GB", "--no-bf16")
            .rstrip()
            .endswith(f"weights are in fp32; without --bf16 or --no-bf16 a run on this machine chooses {dtype}")
        )


TIME = "--time --global-batch-size 8 --device-tflops 0.05 --memory-bandwidth 8"
LINKS = "--node-bandwidth 2 --network-bandwidth 0.5 --devices-per-node 4"


def test_the_time_in_json_is_that_of_the_formula_with_its_parts_and_what_it_was_estimated_from(plan: Run) -> None:
    layout = "--pipeline-model-parallel-size 2 --world-size 8 --no-bf16 --seq-length 64 --overlap-grad-reduce"
    time = json.loads(plan(*f"{TIME} {LINKS} {layout} --json".split()))["time"]
    model = StepTimeModel(
        costs=CostModel(
            shape=SHAPE,
            parallel=ParallelConfig(pipeline_model_parallel_size=2, overlap_grad_reduce=True),
            world_size=8,
            bf16=False,
        ),
        training=TrainingConfig(),
        micro_batch=MicroBatch(sequences=1, seq_length=64),
        micro_batches=2,
        device=Device(tflops=0.05, memory_bandwidth=8.0, node_bandwidth=2.0, network_bandwidth=0.5, devices_per_node=4),
    )
    given = {name: value for name, value in asdict(model.device).items() if value is not None}
    assert (time["is_estimate"], time["device"], time["tokens"], time["micro_batches"]) == (True, given, 512, 2)
    for name, trains in (("plan", plans()[0].trains), ("full", lambda unit: True)):
        step = model.of(trains)
        assert time[name]["step_ms"] == pytest.approx(step.total * 1e3)
        assert time[name]["parts_ms"] == pytest.approx({part: 1e3 * seconds for part, seconds in asdict(step).items()})
        assert time[name]["tokens_per_second"] == pytest.approx(512 / step.total)
        assert time[name]["model_tflops"] == pytest.approx(model.model_flops() / step.total / 8 / 1e12)
    assert time["plan_over_full"] == pytest.approx(time["plan"]["step_ms"] / time["full"]["step_ms"])


def test_the_time_is_said_to_be_an_estimate_with_its_batch_and_device_and_a_table_that_adds_up(plan: Run) -> None:
    lines = plan(*f"{TIME} {LINKS} --world-size 8".split()).split("\n\n")[-1].splitlines()
    assert lines[0].startswith("estimated time of a step of 8 x 128 tokens, by formula and not measured: 1 micro-batch")
    assert lines[1] == (
        "if a device sustains 0.05 TFLOP/s, 8 GB/s of memory, 2 GB/s within a node of 4, 0.5 GB/s between nodes:"
    )
    table = {row[0]: row[1:] for row in (re.split("  +", line.strip()) for line in lines[2:-1])}
    assert table.pop("part (ms)") == ["the plan", "full"]
    rates = [table.pop(name) for name in ("tokens per second", "model TFLOP/s per device")]
    steps = [float(cell.replace(",", "")) for cell in table.pop("step")]
    for column, step in enumerate(steps):
        parts = sum(float(row[column].replace(",", "")) for row in table.values())
        assert parts == pytest.approx(step, abs=0.1 * len(table))
        assert float(rates[0][column].replace(",", "")) == pytest.approx(8 * 128 / step * 1e3, rel=1e-2)
    assert lines[-1].startswith(f"a step of the plan takes {steps[0] / steps[1]:.2f}")


def test_of_several_rounds_the_time_is_the_slowest_ones_and_the_memory_does_not_depend_on_it(plan: Run) -> None:
    words = [*TIME.split(), "--hft-level", "model", "--json"]
    alone = [json.loads(plan(*words, "--hft-first-round", str(round)))["time"]["plan"]["step_ms"] for round in range(3)]
    both = json.loads(plan(*words, "--rounds", "3", "--memory", "1GB"))
    assert both["time"]["plan"]["step_ms"] == max(alone)
    assert (
        both["memory"]
        == json.loads(plan("--hft-level", "model", "--rounds", "3", "--memory", "1GB", "--json"))["memory"]
    )


SHAPE_FLAGS = "--num-layers 8 --hidden-size 64 --num-attention-heads 8 --max-position-embeddings 64"
MISTAKES = [
    ("--load-hf MODEL --world-size 0", "--world-size 0: must be a whole number of at least 1"),
    ("--load-hf MODEL --rounds 0", "--rounds 0: must be a whole number of at least 1"),
    ("--load-hf MODEL --world-size 6 --tensor-model-parallel-size 4", "world size 6; start 4 ranks"),
    ("--load-hf MODEL --tensor-model-parallel-size 3", "--tensor-model-parallel-size 3 does not divide"),
    ("--load-hf MODEL --pipeline-model-parallel-size 3", "--pipeline-model-parallel-size 3 does not divide"),
    ("--load-hf MODEL --hft-ratio 2", "--hft-ratio 2.0: must be a number between 0 and 1"),
    ("--load-hf MODEL --hft-train nothing", "--hft-train"),
    ("--load-hf MODEL --hft-selection spectrum", "--hft-selection spectrum ranks a model's weights"),
    ("--load-hf MODEL --hft-plan absent.json", "--hft-plan absent.json is not a readable file"),
    ("--load-hf MODEL --save absent/plan.json", "--save absent/plan.json cannot be written: No such file"),
    ("--load-hf MODEL --memory 80", "--memory 80: must be a size such as 80GB"),
    ("--load-hf MODEL --memory 0GB", "--memory 0GB: must be a size such as 80GB"),
    (
        "--load-hf MODEL --memory 80GB --micro-batch-size 0",
        "--micro-batch-size 0: must be a whole number of at least 1",
    ),
    ("--load-hf MODEL --memory 80GB --seq-length 129", "--seq-length 129 is beyond the model's 128 positions"),
    (
        "--load-hf MODEL --memory 80GB --recompute-granularity full",
        "--recompute-granularity full needs --recompute-method",
    ),
    ("--load-hf MODEL --time", "--time needs --global-batch-size, the sequences of a step"),
    (
        "--load-hf MODEL --time --global-batch-size 8",
        "--time needs --device-tflops, the sustained TFLOP/s of matrix products",
    ),
    (
        "--load-hf MODEL --time --global-batch-size 8 --device-tflops 1",
        "--time needs --memory-bandwidth, the sustained",
    ),
    (f"--load-hf MODEL --world-size 2 {TIME}", "--time needs --node-bandwidth, the bandwidth"),
    (f"--load-hf MODEL --world-size 16 --node-bandwidth 1 {TIME}", "8 is not a multiple"),
    (f"--load-hf MODEL --world-size 8 {TIME} --devices-per-node 1", "--time needs --network-bandwidth, the bandwidth"),
    (f"--load-hf MODEL --world-size 3 {TIME} --node-bandwidth 1", "--global-batch-size 8 is not a multiple"),
    (f"--load-hf MODEL {TIME} --seq-length 129", "--seq-length 129 is beyond the model's 128 positions"),
    (f"--load-hf MODEL {TIME} --device-tflops 0", "--device-tflops 0.0: must be a number above 0"),
    (f"--load-hf MODEL {TIME} --devices-per-node 0", "--devices-per-node 0: must be a whole number of at least 1"),
    ("--load-hf MODEL --memory-bandwidth 8", "--memory-bandwidth 8 needs --time; add it"),
    ("--load-hf MODEL --png absent/plan.png", "--png absent/plan.png cannot be written: No such file"),
    ("--load-hf MODEL --lr 1", "--lr is an option of `hft-megatron sft`, `dpo` and `pretrain`, not of this command"),
    ("--load-hf MODEL --config wrong.yaml", "wrong.yaml:1: learning_rate 1: give --lr 1."),
    (SHAPE_FLAGS, "--vocab-size is missing: a plan reads no tokenizer"),
    ("", "No model is given"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    words: str,
    message: str,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text("learning_rate: 1\n")
    assert main(["plan", *words.replace("MODEL", str(model_folder)).split()]) == errors.EXIT_USAGE
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.count("\n") == 1


def test_more_rounds_than_the_plan_file_holds_are_refused(
    plan: Run, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "plan.json")
    plan("--rounds", "2", "--save", file)
    words = ["plan", "--load-hf", str(model_folder), "--hft-plan", file, "--rounds", "3"]
    assert main(words) == errors.EXIT_USAGE
    assert f"--hft-plan {file} has 2 rounds" in capsys.readouterr().err
