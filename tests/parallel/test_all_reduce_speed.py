"""The timed all-reduce on real ranks. Run: pytest tests/parallel/test_all_reduce_speed.py"""

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from hft_megatron.doctor.measurements import measure_all_reduce
from tests.support.ranks import RankPools


def run_measure(damaged_rank: int | None = None) -> dict[str, Any]:
    """Measures over all ranks; ``damaged_rank`` finds a wrong number in every sum it receives."""
    original = dist.all_reduce

    def damage(tensor: torch.Tensor, **options: Any) -> None:
        original(tensor, **options)
        if dist.get_rank() == damaged_rank:
            tensor[7] += 1

    with patch.object(dist, "all_reduce", damage):
        speed = measure_all_reduce(dist.group.WORLD, torch.device("cpu"), elements=1000)
    return vars(speed)


def test_every_rank_measures_the_message_and_finds_the_sum_right(ranks: RankPools) -> None:
    for speed in ranks(2).run(run_measure):
        assert speed["message_bytes"] == 4000
        assert 0 < speed["seconds"] < 60
        assert speed["is_right"]


def test_a_wrong_sum_is_seen_by_the_rank_that_has_it(ranks: RankPools) -> None:
    assert [speed["is_right"] for speed in ranks(2).run(run_measure, damaged_rank=1)] == [True, False]
