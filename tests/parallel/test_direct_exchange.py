"""Sums and gathers over sends and receives, against gloo's own. Run: pytest tests/parallel/test_direct_exchange.py"""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hft_megatron.parallel import direct_exchange
from hft_megatron.parallel.direct_exchange import BLOCKS_AHEAD, AllGather, Exchanges, ReduceScatter
from tests.support.ranks import RankPools
from tests.support.wire import Messages

LENGTHS = (1, 5, 1000, 1024, 5000)
"""Elements of a shard, with blocks of 4 KB: less than one, one, and several with a rest."""


def parts_of_all(mine: Tensor) -> Tensor:
    """(ranks, ranks, elements): what every rank has for every rank."""
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return torch.stack(found)


def exchange(name: str) -> int:
    """Compares on this rank; the number of sums that were compared."""
    group, dtype, compared = dist.group.WORLD, getattr(torch, name), 0
    assert group is not None
    rank, size = group.rank(), group.size()
    with patch.object(direct_exchange, "BLOCK_BYTES", 4096), patch.object(direct_exchange, "_free_blocks", []):
        for length in LENGTHS:
            torch.manual_seed(100 * length + rank)
            mine = torch.randn(size, length).to(dtype)
            everyones = parts_of_all(mine)
            in_order = everyones[0, rank].clone()
            for part in everyones[1:, rank]:
                in_order.add_(part)
            glooes = torch.empty(length, dtype=dtype)
            dist.reduce_scatter_tensor(glooes, mine.clone().view(-1))
            rounding = size * torch.finfo(dtype).eps * float(mine.abs().max())
            torch.testing.assert_close(in_order, glooes, rtol=0, atol=rounding)
            for in_place in (True, False):
                for ahead in (1, BLOCKS_AHEAD, None):
                    given = mine.clone()
                    output = given[rank] if in_place else torch.empty(length, dtype=dtype)
                    ReduceScatter(output, given.view(-1), group, ahead=ahead).wait()
                    assert torch.equal(output, in_order)
                    others = [other for other in range(size) if other != rank]
                    assert torch.equal(given[others], mine[others])
                    compared += 1
                whole = torch.full((size, length), torch.nan, dtype=dtype)
                whole[rank] = everyones[rank, rank]
                AllGather(whole.view(-1), whole[rank] if in_place else everyones[rank, rank].clone(), group).wait()
                assert torch.equal(whole, torch.stack([everyones[other, other] for other in range(size)]))
    return compared


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "size", [2, 3, *(pytest.param(size, marks=pytest.mark.slow(reason="a pool of its own")) for size in (4, 8))]
)
def test_sums_are_made_in_the_order_of_ranks_and_gathers_are_gloos(size: int, dtype: str, ranks: RankPools) -> None:
    assert ranks(size).run(exchange, name=dtype) == [6 * len(LENGTHS)] * size


def several_at_once() -> dict[str, Any]:
    """In the background: two sums and a gather, behind which a third sum is made while it is waited for."""
    group = dist.group.WORLD
    assert group is not None
    rank = group.rank()
    with patch.object(direct_exchange, "_free_blocks", []), Messages() as messages:
        buffers = [torch.full((2, length), float(rank + length)) for length in (3_000_000, 7)]
        gathered = torch.full((2, 11), float(rank))
        exchanges = Exchanges()
        for buffer in buffers:
            exchanges.reduce_scatter(buffer[rank], buffer.view(-1), group, in_background=True)
        exchanges.all_gather(gathered.view(-1), gathered[rank], group, in_background=True)
        now = torch.full((2, 13), rank + 1.0)
        exchanges.reduce_scatter(now[rank], now.view(-1), group, in_background=False)
        exchanges.wait()
        blocks = len(direct_exchange._free_blocks)
        exchanges.reduce_scatter(buffers[0][rank], buffers[0].view(-1), group, in_background=True)
        exchanges.wait()
        again = len(direct_exchange._free_blocks)
    return {
        "sums": [buffer[rank].unique().tolist() for buffer in (buffers[1], now)],
        "gathered": gathered.unique().tolist(),
        "sent": messages.bytes,
        "blocks": (blocks, again),
    }


def test_several_run_at_once_and_take_no_new_memory_again(ranks: RankPools) -> None:
    for answer in ranks(2).run(several_at_once):
        assert answer["sums"] == [[15.0], [3.0]]
        assert answer["gathered"] == [0.0, 1.0]
        # Half of each buffer leaves a rank of two, once.
        assert answer["sent"] == {"send": 4 * (2 * 3_000_000 + 7 + 11 + 13)}
        assert answer["blocks"][0] == answer["blocks"][1]
