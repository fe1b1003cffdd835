"""Reduce-scatter and all-gather of gloo groups, by sends and receives between every two ranks.

gloo implements a reduce-scatter by copying the whole buffer, an all-reduce and another copy, and an all-gather by
copies into and out of temporaries. Here a rank sends each other rank the part that it keeps, once, and receives in
place: each of n ranks sends (n - 1) / n of a buffer, half of gloo's reduce-scatter.

Sums are made in the order of the ranks, in the data type of the buffer, so that their bits depend neither on the
shard's owner nor on the order of arrival. Received parts are stored in blocks of ``BLOCK_BYTES`` that are reused:
allocating and freeing memory in every step would cost a page fault for each 4 KB.
"""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK_BYTES = 1 << 20
"""Size of one message of a sum."""
BLOCKS_AHEAD = 8
"""Blocks in flight from each other rank while a rank waits for the first; in the background all of them are."""

_free_blocks: list[Tensor] = []


def is_direct(group: dist.ProcessGroup) -> bool:
    """Return whether the group's collectives are implemented here: those of gloo are."""
    return dist.get_backend(group) == "gloo"


def _others(group: dist.ProcessGroup) -> list[int]:
    return [rank for rank in range(group.size()) if rank != group.rank()]


class ReduceScatter:
    """A running sum over ranks: on rank r of ``group`` the sum of the r-th part of every rank's ``input``."""

    def __init__(self, output: Tensor, input: Tensor, group: dist.ProcessGroup, *, ahead: int | None = None) -> None:
        """``output`` (elements,) may be its part of ``input`` (ranks x elements,), untouched until ``wait``
        returns. ``ahead`` is the number of blocks of each rank that are received at once; None means all."""
        assert input.numel() == group.size() * output.numel()
        assert input.is_contiguous()
        assert output.is_contiguous()
        self._group, self._output, self._input = group, output.view(-1), input.view(-1)
        self._rank, self._others = group.rank(), _others(group)
        length = BLOCK_BYTES // input.element_size()
        self._to_post = deque(
            (start, min(length, output.numel() - start)) for start in range(0, output.numel(), length)
        )
        self._posted: deque[tuple[Tensor, dict[int, tuple[Tensor, Tensor, dist.Work]]]] = deque()
        self._sends: list[dist.Work] = []
        own = self._part(self._rank, 0, output.numel())
        if own.data_ptr() != self._output.data_ptr():
            self._output.copy_(own)
        for _ in range(min(len(self._to_post), ahead or len(self._to_post))):
            self._post()

    def wait(self) -> None:
        """Returns when the sum is in ``output`` and ``input`` is free. RuntimeError where another rank is gone."""
        while self._posted:
            output, received = self._posted.popleft()
            before = None
            for rank, (_, part, work) in received.items():
                work.wait()
                if rank < self._rank:
                    before = part if before is None else before.add_(part)
                    continue
                # Two summands have the same sum in both orders.
                output.add_(part) if before is None else output.add_(before).add_(part)
                before = None
            if before is not None:
                output.add_(before)
            _free_blocks.extend(block for block, _, _ in received.values())
            if self._to_post:
                self._post()
        while self._sends:
            self._sends.pop().wait()

    def _post(self) -> None:
        start, length = self._to_post.popleft()
        received = {}
        for rank in self._others:
            block = _free_blocks.pop() if _free_blocks else torch.empty(BLOCK_BYTES, dtype=torch.uint8)
            part = block.view(self._input.dtype)[:length]
            received[rank] = block, part, self._group.recv([part], rank, 0)
        for rank in self._others:
            self._sends.append(self._group.send([self._part(rank, start, length)], rank, 0))
        self._posted.append((self._output[start : start + length], received))

    def _part(self, rank: int, start: int, length: int) -> Tensor:
        first = rank * self._output.numel() + start
        return self._input[first : first + length]


class AllGather:
    """A running gather: the r-th part of ``output`` is rank r's ``input``."""

    def __init__(self, output: Tensor, input: Tensor, group: dist.ProcessGroup) -> None:
        """``input`` (elements,) may be its part of ``output`` (ranks x elements,); neither may be touched before
        ``wait`` returns."""
        assert output.numel() == group.size() * input.numel()
        assert input.is_contiguous()
        assert output.is_contiguous()
        parts = output.view(-1).view(group.size(), -1)
        mine = parts[group.rank()]
        if mine.data_ptr() != input.data_ptr():
            mine.copy_(input.view(-1))
        self._works = [group.recv([parts[rank]], rank, 0) for rank in _others(group)]
        self._works += [group.send([mine], rank, 0) for rank in _others(group)]

    def wait(self) -> None:
        """Returns when all parts are received and sent. RuntimeError where another rank is gone."""
        while self._works:
            self._works.pop().wait()


class Exchanges:
    """Reduce-scatters and all-gathers that are started together, and waited for as one."""

    def __init__(self) -> None:
        self._started: list[ReduceScatter | AllGather] = []

    def reduce_scatter(self, output: Tensor, input: Tensor, group: dist.ProcessGroup, *, in_background: bool) -> None:
        """Starts one, which is complete when this returns unless it runs ``in_background``."""
        if in_background:
            self._started.append(ReduceScatter(output, input, group))
        else:
            ReduceScatter(output, input, group, ahead=BLOCKS_AHEAD).wait()

    def all_gather(self, output: Tensor, input: Tensor, group: dist.ProcessGroup, *, in_background: bool) -> None:
        """Starts one, which is complete when this returns unless it runs ``in_background``."""
        gather = AllGather(output, input, group)
        if in_background:
            self._started.append(gather)
        else:
            gather.wait()

    def wait(self) -> None:
        """Returns when all that run in the background are complete. RuntimeError where another rank is gone."""
        while self._started:
            self._started.pop(0).wait()
