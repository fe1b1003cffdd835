"""Averages of a task's weights with those before it. Run: pytest tests/methods/continual/test_averaging.py"""

from pathlib import Path

import torch

from hft_megatron.evaluation.weight_changes import folder_weights
from hft_megatron.methods.continual.averaging import AverageWithBefore
from hft_megatron.trainer.loop import next_step
from tests.support.models import LAYOUTS, make_llama
from tests.support.ranks import RankPools
from tests.support.toy_training import TINY, make_run


def run_averaged(folder: str) -> list[bool]:
    """Of each trained shard of this rank: whether its master was another number than its weight, and is that now."""
    run = make_run(folder, LAYOUTS["tp1"], ratio=0.5, training={"bf16": True}, hft={})
    for _ in range(3):  # the rate of the first is 0
        next_step(run)
    found = []
    shards = run.wrapped.shards
    before = {slot.unit: shards.shard_of(slot.parameter) for slot in run.wrapped.training_slots}
    masters = {unit: shard[1]["param"].clone() for unit, shard in before.items() if shard is not None}
    AverageWithBefore(0.25, lambda: folder_weights(folder, option="--load-hf"))._average(run)
    with run.wrapped.gathered_parameters():
        for slot in run.wrapped.training_slots:
            shard, held = shards.shard_of(slot.parameter), shards.range_of(slot.parameter)
            if shard is None:
                continue
            weight = slot.parameter.detach().float().view(-1)[held]
            found += [not torch.equal(masters[slot.unit], weight), torch.equal(shard[1]["param"], weight)]
    return found


def test_the_masters_of_bf16_weights_are_the_average_too(ranks: RankPools, tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", dtype=torch.bfloat16, vocab_size=32, **TINY)
    for found in ranks(2).run(run_averaged, folder=str(folder)):
        assert found
        assert all(found)
