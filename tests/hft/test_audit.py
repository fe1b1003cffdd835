"""The audit sees one bit, and names the unit and the rank that holds it."""

from typing import Any

import pytest
import torch

from hft_megatron.checkpoint.writer import CheckpointWriter
from hft_megatron.config.checkpoint import CheckpointConfig
from hft_megatron.errors import RunFailed
from hft_megatron.hft.on_ranks import fingerprint
from hft_megatron.model.parameters import parameter_slots
from hft_megatron.trainer.loop import next_step, train
from hft_megatron.trainer.saving import SaveCheckpoints
from hft_megatron.trainer.weight_checks import AuditRounds
from tests.support.models import LAYOUTS, make_llama
from tests.support.ranks import RankPools
from tests.support.toy_training import TINY, make_run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_single_bit_changes_the_fingerprint(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    words = tensor.view(-1).view(torch.int32 if dtype == torch.float32 else torch.int16)
    seen = {fingerprint(tensor)}
    for position in range(words.numel()):
        for bit in range(8 * words.element_size() - 1):
            words[position] ^= 1 << bit
            seen.add(fingerprint(tensor))
            words[position] ^= 1 << bit
    assert len(seen) == 1 + words.numel() * (8 * words.element_size() - 1)


def test_equal_bits_have_one_fingerprint_whatever_the_memory_layout() -> None:
    tensor = torch.randn(40, 30)
    assert fingerprint(tensor.t()) == fingerprint(tensor.t().contiguous()) != fingerprint(tensor)


def test_a_negative_zero_is_not_a_zero() -> None:
    assert fingerprint(torch.zeros(3)) != fingerprint(-torch.zeros(3))


def flip_a_bit(run: Any, unit: str) -> None:
    slot = next(slot for slot in parameter_slots(run.wrapped.modules) if slot.unit == unit)
    slot.parameter.detach().view(-1).view(torch.int32)[-1] ^= 1


def frozen_matrix(run: Any, layer: int) -> str:
    """A frozen matrix of a layer, of which every tensor-parallel rank holds a shard."""
    units = run.wrapped.plan.units
    return next(
        u.name for u in units if u.layer == layer and u.category != "norm" and not run.wrapped.plan.trains(u.name)
    )


def run_with_a_flipped_bit(folder: str, layout: dict[str, Any], guilty: int, interval: int | None) -> dict[str, Any]:
    """Trains two rounds of two steps under the audit; in the second one, rank ``guilty`` has a bit flipped."""
    run = make_run(
        folder, layout, training={"train_iters": 4}, optimizer={"lr_warmup_iters": 0}, hft={"hft_round_interval": "2"}
    )
    hook = AuditRounds(interval)
    hook.at_round_start(run)
    for step in range(4):
        next_step(run, [hook])
        if step == 2 and run.placement.rank == guilty:
            flip_a_bit(run, frozen_matrix(run, 3))
        try:
            hook.after_iteration(run)
        except RunFailed as failure:
            return {"failure": str(failure), "after": step, "unit": frozen_matrix(run, 3)}
    try:
        hook.at_round_end(run)
    except RunFailed as failure:
        return {"failure": str(failure), "after": "the end", "unit": frozen_matrix(run, 3)}
    return {"failure": None}


@pytest.mark.parametrize(("interval", "noticed"), [(None, "the end"), (1, 2)])
def test_a_flipped_bit_in_a_frozen_shard_is_named_on_every_rank(
    interval: int | None, noticed: int | str, ranks: RankPools, tmp_path: Any
) -> None:
    folder = str(make_llama(tmp_path / "model", "gqa", **TINY))
    results = ranks(4).run(
        run_with_a_flipped_bit, folder=folder, layout=LAYOUTS["tp2_pp2"], guilty=3, interval=interval
    )
    assert len({result["failure"] for result in results}) == 1
    assert results[3]["after"] == noticed
    failure = results[0]["failure"]
    assert "1 frozen shard changed" in failure
    assert results[3]["unit"] in failure
    assert "rank 3 on " in failure
    assert "TP 1, PP 1" in failure


def run_into_a_checkpoint(folder: str, save: str) -> str:
    """The failure of saving after a bit flipped; the audit itself is not due yet."""
    run = make_run(folder, {}, training={"train_iters": 4}, optimizer={"lr_warmup_iters": 0})
    audit = AuditRounds(None)
    options = CheckpointConfig(save=save, save_interval=2)
    saver = SaveCheckpoints(options, CheckpointWriter(options, run.placement), last=None, audit=audit)
    audit.at_round_start(run)
    next_step(run)
    saver.after_iteration(run)
    flip_a_bit(run, frozen_matrix(run, 1))
    next_step(run)
    with pytest.raises(RunFailed) as caught:
        saver.after_iteration(run)
    return str(caught.value)


def test_a_checkpoint_with_a_changed_frozen_shard_is_not_written(ranks: RankPools, tmp_path: Any) -> None:
    """A run that resumed from it would take its bits for the right ones."""
    folder = str(make_llama(tmp_path / "model", "gqa", **TINY))
    [said, _] = ranks(2).run(run_into_a_checkpoint, folder=folder, save=str(tmp_path / "run"))
    assert "frozen shard" in said
    assert not list(tmp_path.glob("run/iter_*"))


def run_audited(folder: str, layout: dict[str, Any]) -> int:
    lines: list[str] = []
    run = make_run(
        folder, layout, training={"train_iters": 4}, optimizer={"lr_warmup_iters": 0}, hft={"hft_round_interval": "2"}
    )
    run.announce = lines.append
    train(run, [AuditRounds(1)])
    return sum("no frozen shard has changed" in line for line in lines)


def test_an_untouched_run_passes_the_audit_of_each_round(ranks: RankPools, tmp_path: Any) -> None:
    folder = str(make_llama(tmp_path / "model", "tied", **TINY))
    assert ranks(2).run(run_audited, folder=folder, layout=LAYOUTS["pp2_vpp"]) == [2, 2]
