"""Elastic weight consolidation against plain PyTorch: penalty, gradient and Fisher information, in every layout.

Run: pytest tests/methods/test_ewc.py
"""

import copy
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import LlamaForCausalLM

from hft_megatron.config.ewc import EwcConfig
from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.config.run_folder import FISHER_FOLDER
from hft_megatron.errors import EXIT_STOPPED, EXIT_USAGE
from hft_megatron.hft.plan import Plan, make_plan
from hft_megatron.methods.continual.ewc import parts_of
from hft_megatron.model.parameter_names import checkpoint_names, whole_shape
from tests.support.models import LAYOUTS, flags
from tests.support.plain_ewc import BATCHES, LAMBDA, STEPS, PlainTask, named, plain_fisher, plain_task
from tests.support.plain_run import parse, samples_of_files
from tests.support.ranks import RankPools, RanksFailed
from tests.support.runs import Recorder, make_inputs, read_metrics, run_cli, run_recorded, write_data

OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "3000"]
LAYOUT_WORDS = {
    "tp2": flags(LAYOUTS["tp2"]),
    "tp2_sp": flags(LAYOUTS["tp2_sp"]),
    "pp2": flags(LAYOUTS["pp2"]),
    "dp2": [],
    "dp2 overlap": OVERLAP,
}
HALF = ["--hft-rotation", "complementary"]
FULL = ["--hft-ratio", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and the data of two tasks."""
    inputs = make_inputs(tmp_path_factory.mktemp("ewc"), "tied", hidden_size=32, intermediate_size=56)
    rows = [json.loads(line) for line in write_data(inputs / "second.jsonl", 20).read_text().splitlines()]
    for number, row in enumerate(rows):
        row["messages"][1]["content"] = f"{'river ' * (1 + number % 3)}{7 * number}"
    (inputs / "second.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return inputs


def words_of(folder: Path, task: int, save: Path, *options: object) -> list[str]:
    """Of the first task (0) or the second, whose weights are those that the first left."""
    data = folder / ("data.jsonl" if task == 0 else "second.jsonl")
    words = ["--load-hf", folder / "model", "--train-data-path", data, "--seq-length", 96, "--no-bf16"]
    words += ["--train-iters", STEPS, "--global-batch-size", 4, "--lr", 5e-3, "--lr-warmup-iters", 1]
    words += ["--adam-eps", 1e-5, "--weight-decay", 0.1, "--clip-grad", 1.0, "--hft-first-round", task]
    words += ["--save", save / f"task{task}"]
    words += ["--load", save / "task0", "--finetune"] if task == 1 else []
    return [str(word) for word in (*words, *options)]


@dataclass
class Watch(Recorder):
    """Notes what the penalty held in every step, and the bits that the measuring at the end must leave alone."""

    held: list[dict[str, Any]] = field(default_factory=list)
    before: list[Any] = field(default_factory=list)

    def after_step(self, run: Any, result: Any) -> None:
        super().after_step(run, result)
        shards = run.wrapped.shards
        units = {} if shards.penalty is None else {shards._unit_of[p]: t for p, t in shards.penalty.curvature.items()}
        self.held.append(
            {
                "bytes": 0 if shards.penalty is None else shards.penalty.bytes,
                "elements": {unit: tensor.numel() for unit, tensor in units.items()},
                "updated": sum(shard.numel() for shard in shards.updated_shards().values()),
                "trains": sorted(run.wrapped.plan.training),
            }
        )

    def at_end(self, run: Any) -> None:
        super().at_end(run)
        self.before = bits_of(run)


def bits_of(run: Any) -> list[Any]:
    from hft_megatron.checkpoint.store import random_state
    from hft_megatron.model.parameters import parameter_slots

    with run.wrapped.gathered_parameters():
        weights = [slot.parameter.detach().double().sum().item() for slot in parameter_slots(run.wrapped.modules)]
    return [weights, {name: state.tolist() for name, state in random_state().items()}]


def run_task(words: list[str], strength: float = LAMBDA, kill_at: int | None = None) -> dict[str, Any]:
    """On a rank: one task, and what was seen of its penalty."""
    watch = Watch(kill_at=kill_at, kill_rank=0)
    options = EwcConfig(ewc_lambda=strength, ewc_batches=BATCHES)
    values = run_recorded("sft", words, watch, ewc=options)
    if watch.before:
        assert watch.before == bits_of(watch.run), "measuring the Fisher information changes no bit of the run"
    return {**values, "held": watch.held}


def tensors_of(folder: Path, name: str, shape: ModelShape) -> dict[str, Tensor]:
    """unit -> whole tensor, of those that a folder of Fisher information holds under ``name``."""
    reader = FileSystemReader(folder)
    index = reader.read_metadata()
    reader.set_up_storage_reader(index, is_coordinator=True)
    found = {}
    for unit, key in checkpoint_names(shape).items():
        entry = index.state_dict_metadata[f"{name}.{key}"]
        assert isinstance(entry, TensorStorageMetadata)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        planner = DefaultLoadPlanner()
        planner.set_up_planner({f"{name}.{key}": tensor}, index, is_coordinator=True)
        reader.read_data(planner.create_local_plan(), planner).wait()
        found[unit] = tensor[: whole_shape(unit, shape)[0]]
    return found


def far(found: Tensor, expected: Tensor) -> float:
    """The distance, relative to what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.slow(reason="two runs each, and their reference")
@pytest.mark.parametrize(
    ("kind", "layout"),
    [("half", "tp2"), ("half", "pp2"), ("half", "dp2"), ("full", "tp2_sp"), ("full", "dp2 overlap")],
)
def test_two_tasks_equal_plain_pytorch_on_the_penalised_loss(
    layout: str, kind: str, ranks: RankPools, folder: Path, tmp_path: Path
) -> None:
    options = [*LAYOUT_WORDS[layout], *(HALF if kind == "half" else FULL)]
    shape = ModelShape.from_hf_config(load_hf_config(str(folder / "model")), "model")
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    fisher, start = None, {}
    for task in (0, 1):
        exported = tmp_path / f"exported{task}"
        words = words_of(folder, task, tmp_path, *options, "--save-hf", exported)
        start = {unit: p.detach().clone() for unit, p in named(model).items()}
        expected = plain_task(model, words_of(folder, task, tmp_path, *options), shape, fisher)
        answers = ranks(2).run(run_task, words=words)
        steps = answers[-1]["steps"]
        assert [step["loss"] for step in steps] == pytest.approx(expected.losses, rel=1e-5)
        assert [step["grad_norm"] for step in steps] == pytest.approx(expected.norms, rel=1e-5)
        if task == 1:
            penalties = [step["measured"]["ewc penalty"] for step in steps]
            assert penalties[0] == 0.0
            assert penalties == pytest.approx(expected.penalties, rel=1e-4)
            assert max(penalties) > 0.05
            logged = [record["ewc penalty"] for record in read_metrics(tmp_path / "task1") if "lm loss" in record]
            assert logged == penalties
        check_held(answers, expected.plan, task, data_parallel=layout.startswith("dp"))
        weights = load_file(exported / "model.safetensors")
        for unit, p in named(model).items():
            assert far(weights[f"{unit}.weight"], p.detach()) < 1e-5, unit
        check_fisher_folder(tmp_path / f"task{task}" / FISHER_FOLDER, shape, weights, expected, task)
        if task == 0:
            check_fisher_of_same_weights(
                tmp_path / "task0" / FISHER_FOLDER, words_of(folder, 0, tmp_path, *options), model
            )
        fisher = expected.fisher
    frozen = [unit for unit in start if not expected.plan.trains(unit)]
    assert bool(frozen) == (kind == "half")
    first = load_file(tmp_path / "exported0" / "model.safetensors")
    assert all(torch.equal(weights[f"{unit}.weight"], first[f"{unit}.weight"]) for unit in frozen)


def check_held(answers: Sequence[dict[str, Any]], plan: Plan, task: int, *, data_parallel: bool) -> None:
    """In the second task a rank has F and theta* in fp32 of what it updates, and of nothing else."""
    for answer in answers:
        for held in answer["held"]:
            assert held["trains"] == sorted(plan.training)
            assert held["bytes"] == (2 * 4 * held["updated"] if task == 1 else 0)
            assert sum(held["elements"].values()) == (held["updated"] if task == 1 else 0)
            assert held["elements"].keys() <= plan.training
    if task == 1 and data_parallel:
        # Both together have every element once.
        mine, others = (answer["held"][0]["bytes"] for answer in answers)
        assert mine + others == 2 * 4 * plan.trainable_parameters
        assert math.isclose(mine, others, rel_tol=0.1)


def check_fisher_folder(
    folder: Path, shape: ModelShape, weights: Mapping[str, Tensor], expected: PlainTask, task: int
) -> None:
    """The weights are the task's last ones, bit for bit, and F is that of all tasks, of frozen units too."""
    facts = json.loads((folder / "fisher.json").read_text())
    assert facts == {"iteration": STEPS, "batches": BATCHES, "tasks": task + 1}
    anchor, fisher = (tensors_of(folder, name, shape) for name in ("anchor", "fisher"))
    assert all(torch.equal(anchor[unit], weights[f"{unit}.weight"]) for unit in anchor)
    for unit, values in expected.fisher.items():
        assert far(fisher[unit], values) < 1e-5, unit


def check_fisher_of_same_weights(folder: Path, words: list[str], model: LlamaForCausalLM) -> None:
    """Measured by the reference in fp64 at the engine's own last weights, so that nothing but F itself can differ."""
    config, other = parse("sft", words), copy.deepcopy(model).double()
    shape = ModelShape.from_hf_config(load_hf_config(str(config.model.load_hf)), "model")
    anchor, fisher = (tensors_of(folder, name, shape) for name in ("anchor", "fisher"))
    with torch.no_grad():
        for unit, parameter in named(other).items():
            parameter.copy_(anchor[unit])
    samples, _ = samples_of_files("sft", config, shape)
    for unit, values in plain_fisher(other, samples).items():
        # Rounding of fp32 gradients, squared; measured: 2.4e-6 of one k_proj.
        assert far(fisher[unit], values) < 5e-6, unit


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".distcp"}


@pytest.mark.slow(reason="three runs")
@pytest.mark.parametrize("precision", ["--no-bf16", "--bf16"])
def test_a_task_resumes_in_its_middle_to_the_last_bit_over_rounds_of_its_own(
    precision: str, ranks: RankPools, folder: Path, tmp_path: Path
) -> None:
    options = [*HALF, *OVERLAP, precision, "--hft-round-interval", "2", "--hft-moments", "carry"]
    ranks(2).run(run_task, words=words_of(folder, 0, tmp_path, *options, "--train-iters", 4))
    whole = ranks(2).run(run_task, words=words_of(folder, 1, tmp_path, *options))
    bits = files_of(tmp_path / "task1" / FISHER_FOLDER)
    (tmp_path / "task1").rename(tmp_path / "whole")
    begun = ranks(2).run(run_task, words=words_of(folder, 1, tmp_path, *options), kill_at=3)
    assert begun[0]["stopped"]
    assert not (tmp_path / "task1" / FISHER_FOLDER).exists()
    gone_on = ranks(2).run(run_task, words=words_of(folder, 1, tmp_path, *options))
    for one, two, all_of_it in zip(begun, gone_on, whole, strict=True):
        assert one["steps"] + two["steps"] == all_of_it["steps"]
        assert one["held"] + two["held"] == all_of_it["held"]
        assert two["state"] == all_of_it["state"]
    assert bits
    assert files_of(tmp_path / "task1" / FISHER_FOLDER) == bits
    for answer in whole:
        assert all(held["bytes"] == 8 * held["updated"] for held in answer["held"])
    penalties = [step["measured"]["ewc penalty"] for step in whole[-1]["steps"]]
    assert min(penalties[2:]) > 0.03
    # Before the first update with a rate; in bf16 the masters continue too, and theta* is their rounding.
    assert [penalty > 0 for penalty in penalties[:2]] == [precision == "--bf16"] * 2
    assert max(penalties[:2]) < 0.001
    assert len({tuple(held["trains"]) for held in whole[0]["held"]}) == 2


@pytest.mark.slow(reason="seven runs")
def test_what_one_layout_has_measured_holds_another_and_a_loss_of_it_is_told(
    ranks: RankPools, folder: Path, tmp_path: Path
) -> None:
    ranks(2).run(run_task, words=words_of(folder, 0, tmp_path, *HALF, *LAYOUT_WORDS["tp2"]))
    fisher = tmp_path / "task0" / FISHER_FOLDER
    found = []
    for layout in ("pp2", "dp2"):
        found.append(ranks(2).run(run_task, words=words_of(folder, 1, tmp_path, *HALF, *LAYOUT_WORDS[layout]))[-1])
        (tmp_path / "task1").rename(tmp_path / layout)
    one, other = ([step["measured"]["ewc penalty"] for step in answer["steps"]] for answer in found)
    assert max(one) > 0.05
    assert one == pytest.approx(other, rel=1e-4)

    words = words_of(folder, 1, tmp_path, *HALF)
    [file, *_] = sorted(fisher.glob("*.distcp"))
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(RanksFailed, match=r"UserError: .*distcp is not as it was saved .*; copy the folder .*task0"):
        ranks(2).run(run_task, words=words)
    file.write_bytes(kept)
    assert ranks(2).run(run_task, words=words, kill_at=2)[0]["stopped"]
    (tmp_path / "task0").rename(tmp_path / "gone")
    with pytest.raises(RanksFailed, match=r"UserError: --ewc-lambda: .*task0, whose weights this run started from"):
        ranks(2).run(run_task, words=words)
    (tmp_path / "gone").rename(tmp_path / "task0")
    shutil.rmtree(fisher)
    with pytest.raises(RanksFailed, match=r"UserError: --ewc-lambda needs .*task0/fisher, where the task in --load"):
        ranks(2).run(run_task, words=words)


@pytest.mark.slow(reason="four runs")
def test_a_pipeline_stage_without_a_unit_that_trains_measures_its_own_all_the_same(
    ranks: RankPools, folder: Path, tmp_path: Path
) -> None:
    options = ["--hft-freeze-embedding", "--hft-freeze-head", "--hft-freeze", "model.layers.0.*,model.layers.1.*"]
    shape = ModelShape.from_hf_config(load_hf_config(str(folder / "model")), "model")
    found: list[Any] = []
    for layout in ("pp2", "dp2"):
        for task in (0, 1):
            words = words_of(folder, task, tmp_path / layout, *options, *LAYOUT_WORDS[layout])
            answers = ranks(2).run(run_task, words=words)
        fisher = tensors_of(tmp_path / layout / "task1" / FISHER_FOLDER, "fisher", shape)
        found.append(([step["measured"]["ewc penalty"] for step in answers[-1]["steps"]], fisher))
        if layout == "pp2":
            assert [answer["held"][0]["updated"] > 0 for answer in answers] == [False, True]
    (one, of_one), (other, of_other) = found
    assert max(one) > 0
    assert one == pytest.approx(other, rel=1e-4)
    assert all(far(of_one[unit], of_other[unit]) < 1e-5 for unit in of_one)
    assert all(bool(values.any()) for values in of_one.values())


@pytest.mark.slow(reason="five runs")
def test_a_task_is_measured_once_and_only_where_it_is_asked_for(ranks: RankPools, folder: Path, tmp_path: Path) -> None:
    words = words_of(folder, 0, tmp_path, *HALF)
    plain = ranks(1).run(run_task, words=words, strength=0.0)[0]
    assert not (tmp_path / "task0" / FISHER_FOLDER).exists()
    # Whose weights were trained without is a first task like any other.
    second = words_of(folder, 1, tmp_path, *HALF)
    begun = ranks(1).run(run_task, words=second)[0]
    assert "> ewc: no earlier task: nothing holds the weights" in begun["said"]
    fisher = tmp_path / "task1" / FISHER_FOLDER
    assert json.loads((fisher / "fisher.json").read_text())["tasks"] == 1
    bits = files_of(fisher)
    again = ranks(1).run(run_task, words=second)[0]
    assert not any("> ewc" in line for line in again["said"])
    assert files_of(fisher) == bits
    # A run that was killed while it measured has no step left, and measures.
    shutil.rmtree(fisher)
    fisher.with_name("fisher.unfinished").mkdir()
    ranks(1).run(run_task, words=second)
    assert files_of(fisher) == bits
    assert not fisher.with_name("fisher.unfinished").exists()
    # One that resumes is another task for whoever follows, until it ends.
    ranks(1).run(run_task, words=[*second, "--train-iters", str(STEPS + 2)], kill_at=STEPS + 1)
    third = [*words_of(folder, 1, tmp_path), "--load", str(tmp_path / "task1"), "--save", str(tmp_path / "task2")]
    with pytest.raises(RanksFailed, match=r"UserError: .* of .*iter_0000006, .* has that of iteration 5; let the task"):
        ranks(1).run(run_task, words=third)
    assert [step["measured"].keys() for step in plain["steps"]] == [{"lm loss": 0.0}.keys()] * STEPS


STAGES = """
- method: sft
  train_data_path: {folder}/data.jsonl
  ewc_lambda: 1000
- method: sft
  train_data_path: {folder}/second.jsonl
  ewc_lambda: 1000
"""


@pytest.mark.slow(reason="five starts of two stages")
def test_stages_hold_what_the_ones_before_them_need_wherever_they_are_moved(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "stages.yaml").write_text(STAGES.format(folder=folder))
    log, found = tmp_path / "log", []

    def run(save: Path, *options: object) -> int:
        words = words_of(folder, 0, save, *HALF, "--save", save, "--load", save, *options)
        at = words.index("--hft-first-round")
        words = [*words[:at], *words[at + 2 :], "--stages", str(tmp_path / "stages.yaml")]
        return run_cli(words, log=log)

    assert run(tmp_path / "whole") == 0, log.read_text()[-3000:]
    assert "> ewc: 20 units are held to their weights after 1 tasks" in log.read_text()
    for interval in (4, 3):  # in the first stage, and in the second
        assert run(tmp_path / "parted", "--exit-interval", interval) == EXIT_STOPPED, log.read_text()[-3000:]
    assert (tmp_path / "parted" / "stage_1_sft" / "iter_0000003").exists()
    (tmp_path / "parted").rename(tmp_path / "moved")
    assert run(tmp_path / "moved") == 0, log.read_text()[-3000:]
    for save in ("whole", "moved"):
        stage = tmp_path / save / "stage_1_sft"
        found.append(([step["ewc penalty"] for step in read_metrics(stage)], files_of(stage / FISHER_FOLDER)))
    assert found[0] == found[1]
    assert max(found[0][0]) > 0.05
    stages = (tmp_path / "stages.yaml").read_text().replace("- method: sft", "- method: dpo", 1)
    (tmp_path / "stages.yaml").write_text(stages)
    assert run(tmp_path / "moved") == EXIT_USAGE
    assert "--ewc-lambda 1000 is for the tasks of sft; leave it out of other stages." in log.read_text()


def test_units_take_turns_in_parts_of_the_size_of_a_round(folder: Path) -> None:
    shape = ModelShape.from_hf_config(load_hf_config(str(folder / "model")), "model")
    half, tenth, full = (
        make_plan(shape, HFTConfig(hft_ratio=ratio, hft_freeze=freeze), default_seed=1)
        for ratio, freeze in ((0.5, None), (0.1, "model.embed_tokens"), (1.0, None))
    )
    assert parts_of(full) == [full.training]
    for plan in (half, tenth):
        parts, sizes = parts_of(plan), {unit.name: unit.parameters for unit in plan.units}
        assert parts[0] == plan.training
        assert sorted(unit for part in parts for unit in part) == sorted(sizes)
    assert len(parts_of(half)) == 2
    assert len(parts_of(tenth)) > 5
