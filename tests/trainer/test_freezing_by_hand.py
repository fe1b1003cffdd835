"""What goes wrong in silence where megatron-core's users freeze and save by hand: here each is right or one sentence.

The letters are the cases that were run on megatron-core 0.16.1 alone (two data-parallel ranks): freezing after wrapping
saved nothing and decayed frozen weights, unfreezing never trained, fresh or differing optimizer state did not save.
"""

import importlib.util
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from hft_megatron.checkpoint.store import check_saved_plan, load_checkpoint
from hft_megatron.checkpoint.writer import CheckpointWriter
from hft_megatron.config.checkpoint import CheckpointConfig, outputs_can_be_written
from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.config.run import RunConfig
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import make_plan
from hft_megatron.model.parameters import parameter_slots
from hft_megatron.optimizer.wrapping import wrap
from hft_megatron.trainer.run import Run
from tests.support.models import make_llama
from tests.support.toy_training import TINY, local_weights, make_run, take_steps, toy_plan

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
DECAYING = {"lr_warmup_iters": 0, "weight_decay": 0.1}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    return str(make_llama(tmp_path_factory.mktemp("by_hand") / "model", **TINY))


def start(folder: str, layout: dict[str, Any] | None = None, **hft: Any) -> Run:
    return make_run(folder, layout or {}, training={"micro_batch_size": 4}, optimizer=DECAYING, hft=hft)


def flip(run: Run, *, to: bool) -> str:
    """Flips the flag of the first unit that has the other one; returns its name."""
    slot = next(s for s in parameter_slots(run.wrapped.modules) if s.parameter.requires_grad != to)
    slot.parameter.requires_grad = to
    return slot.unit


def run_flipping(folder: str, layout: dict[str, Any], steps: int, to: bool) -> dict[str, Any]:
    """The refusal of the next step, the unit that was flipped, and the weights that moved all the same."""
    run = start(folder, layout)
    take_steps(run, steps)
    unit = flip(run, to=to)
    before = local_weights(run)
    try:
        take_steps(run, 1)
        refusal = ""
    except AssertionError as error:
        refusal = str(error)
    after = local_weights(run)
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    return {"unit": unit, "refusal": refusal, "moved": moved}


FLIPS: dict[str, tuple[dict[str, Any], int, bool]] = {
    "B and B2 frozen after wrapping": ({}, 0, False),
    "B3 frozen between steps": ({}, 1, False),
    "C frozen after wrapping, with overlap": (OVERLAP, 0, False),
    "C2 frozen between steps, with overlap": (OVERLAP, 2, False),
    "D unfrozen between steps": ({}, 1, True),
}
"""Parallel options, steps before the flag is flipped, and to what."""


@pytest.mark.parametrize("case", FLIPS)
def test_B_to_D_a_flag_flipped_after_wrapping_is_named_before_any_weight_moves(ranks, folder, case):
    layout, steps, to = FLIPS[case]
    for answer in ranks(2).run(run_flipping, folder=folder, layout=layout, steps=steps, to=to):
        assert answer["refusal"].startswith(f"requires_grad of {answer['unit']} was flipped after")
        assert answer["moved"] == []


def test_E_everything_frozen_is_one_sentence(folder):
    with pytest.raises(UserError, match=r"^--hft-\S.*[^.]\.$"):
        toy_plan(folder, HFTConfig(hft_freeze="*"))


def run_rewrapping(folder: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Three rounds of one step with everything of the rounds before still referred to, and a second wrapping."""
    run = start(folder, layout, hft_round_interval="1")
    kept, wrong, sizes = [], [], []
    for _ in range(3):
        before = local_weights(run)
        take_steps(run, 1)
        after = local_weights(run)
        moved = {unit for unit, name in before if not torch.equal(before[unit, name], after[unit, name])}
        wrong += sorted(moved ^ run.wrapped.plan.training)
        trained = sum(s.parameter.numel() for s in parameter_slots(run.wrapped.modules) if s.parameter.requires_grad)
        sizes.append(run.wrapped.shards.gradient_bytes / 4 / trained)
        kept.append((run.wrapped, run.wrapped.chunks, run.wrapped.optimizer, run.wrapped.shards))
    try:
        wrap(run.wrapped.modules, run.wrapped.plan, run.config.parallel, run.config.optimizer, bf16=False)
        refusal = ""
    except AssertionError as error:
        refusal = str(error)
    return {"wrong": wrong, "sizes": sizes, "refusal": refusal}


@pytest.mark.parametrize("layout", [{}, OVERLAP], ids=["reduced at the end", "overlapped"])
def test_A_F_F2_each_round_trains_its_plan_in_buffers_of_its_size_though_old_wrappers_are_kept(ranks, folder, layout):
    for answer in ranks(2).run(run_rewrapping, folder=folder, layout=layout):
        assert answer["wrong"] == []
        assert all(1 <= size < 1.2 for size in answer["sizes"])  # the rest pads buckets
        assert answer["refusal"].endswith("is still wrapped for an earlier plan")


def run_saving_first(folder: str, save: str) -> list[Any]:
    """Two steps after a checkpoint of the beginning."""
    run = start(folder)
    with patch.object(filesystem_async.mp, "get_context", fork_only(filesystem_async.mp.get_context)):
        CheckpointWriter(CheckpointConfig(save=save), run.placement).save(run.wrapped, run.state)
    return take_steps(run, 2)


def fork_only(original: Any) -> Any:
    def get_context(method: str) -> Any:
        assert method == "fork", "a spawned process would import the user's main file again"
        return original(method)

    return get_context


def run_loaded(folder: str, save: str) -> list[Any]:
    run = start(folder)
    load_checkpoint(Path(save) / "iter_0000000", run.wrapped, run.placement)
    return take_steps(run, 2)


def test_saving_before_the_first_step_needs_no_main_guard_and_loads_as_a_fresh_start(ranks, folder, tmp_path):
    whole = ranks(2).run(run_saving_first, folder=folder, save=str(tmp_path))
    assert ranks(2).run(run_loaded, folder=folder, save=str(tmp_path)) == whole


def run_two_rounds(folder: str, save: str) -> dict[str, Any]:
    """Step counts by unit and in AdamW after a round of two steps and one step of the next; and they can be saved."""
    run = start(folder, hft_round_interval="2", hft_moments="carry")
    take_steps(run, 3)
    CheckpointWriter(CheckpointConfig(save=save), run.placement).save(run.wrapped, run.state)
    shards = run.wrapped.shards
    counted = {
        slot.unit: float(shards.optimizer.state[shards._main_param(slot.parameter)[1]]["step"])
        for slot in parameter_slots(run.wrapped.modules)
        if slot.parameter in shards.model_param_group_index_map
    }
    return {"counted": counted, "by unit": run.wrapped.unit_steps}


def test_S_steps_that_differ_between_units_are_counted_by_unit_and_saved(ranks, folder, tmp_path):
    answers = ranks(2).run(run_two_rounds, folder=folder, save=str(tmp_path))
    for answer in answers:
        assert answer["counted"].items() <= answer["by unit"].items()
        assert set(answer["by unit"].values()) == {1, 3}
    assert {steps for answer in answers for steps in answer["counted"].values()} == {1, 3}


def test_a_different_mask_on_resume_is_refused_by_unit(tmp_path: Path, folder: str) -> None:
    shape = ModelShape.from_hf_config(load_hf_config(folder), folder)
    saved, asked = (make_plan(shape, HFTConfig(hft_seed=seed), default_seed=0) for seed in (1, 2))
    (tmp_path / "plan.json").write_text(saved.to_json())
    with pytest.raises(UserError, match=rf"differ first in {saved.first_difference(asked)};"):
        check_saved_plan(tmp_path, asked, shape)


def test_psutil_missing_is_one_sentence_before_training_and_not_a_trainer_that_waits(tmp_path: Path, folder: str):
    shape = ModelShape.from_hf_config(load_hf_config(folder), folder)
    saving = RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path)))
    find = importlib.util.find_spec
    with patch("hft_megatron.config.checkpoint.find_spec", lambda name: None if name == "psutil" else find(name)):
        outputs_can_be_written(RunConfig(), shape, 1)
        with pytest.raises(UserError, match=r"^--save \S+ needs the package psutil, .*`pip install psutil`"):
            outputs_can_be_written(saving, shape, 1)
    outputs_can_be_written(saving, shape, 1)
