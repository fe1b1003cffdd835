"""MoFO: only the entries of a matrix with the largest first moments are updated (Chen et al., arXiv 2407.20999).

AdamW's moments and weight decay apply to all entries. In a matrix with n entries those with |m| >= the k-th largest
|m|, k = int(n x fraction), also get AdamW's update. The threshold is that of the whole matrix as Hugging Face has it,
however it is sharded: the k-th largest is found exactly, digit by digit of its bits, from counts that all ranks of a
pipeline stage add up. It has no state of its own: a checkpoint doesn't know of it.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.model.parameter_names import whole_shape
from hft_megatron.model.parameters import ParameterSlot
from hft_megatron.optimizer.distributed import HFTDistributedOptimizer

DIGITS = (11, 10, 10)
"""Bits of a magnitude that one count settles, from the highest down: all 31 beside the sign."""
MAGNITUDE = 0x7FFFFFFF
"""Bits of an fp32 number but for the sign: as whole numbers they are in the order of the absolute values."""
MOST_ELEMENTS = 1 << 28
"""Elements of the parameters whose weights are held a second time, 1 GiB, unless one alone has more."""
CHUNK = 1 << 22
"""Elements whose bits are processed together, which bounds the memory for that."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One matrix that trains, on this rank; all ranks of a pipeline stage have the same ones in the same order."""

    moving: int
    """Entries of the whole matrix that move, where no two are equal."""
    elements: int
    """Entries of this tensor-parallel rank's part."""
    shard: Tensor | None
    """(elements,) fp32, which the optimizer updates; None where other data-parallel ranks hold all of it."""


class MomentumFilteredAdamW(torch.optim.AdamW):
    """torch's AdamW (fused on request), whose update of a matrix applies to its largest moments alone.

    Norms, which are no matrices, are updated in full. ``step`` is collective.
    """

    _parts: Sequence[Sequence[Matrix]] | None = None
    _group: dist.ProcessGroup

    def filter(self, matrices: Sequence[Matrix], group: dist.ProcessGroup) -> None:
        """Sets the filtered matrices, before the first step; ``group`` are the ranks that hold parts of them."""
        self._parts, self._group = list(_parts_of(matrices)), group

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None
        assert self._parts is not None, "filter() comes before the first step"
        group_of = {id(shard): group for group in self.param_groups for shard in group["params"]}
        matrices = {id(one.shard) for part in self._parts for one in part if one.shard is not None}
        self._update(group_of.keys() - matrices)
        for part in self._parts:
            shards = [one.shard for one in part]
            before = [None if shard is None else shard.detach().clone() for shard in shards]
            self._update({id(shard) for shard in shards if shard is not None})
            moments = [None if shard is None else self.state[shard]["exp_avg"] for shard in shards]
            thresholds = kth_largest(moments, [one.moving for one in part], self._group)
            for shard, old, moment, threshold in zip(shards, before, moments, thresholds, strict=True):
                if shard is not None:
                    assert old is not None
                    assert moment is not None
                    group = group_of[id(shard)]
                    old.mul_(1 - group["lr"] * group["weight_decay"])
                    _take_back(shard.detach(), old, moment, threshold)

    def _update(self, chosen: Collection[int]) -> None:
        """AdamW's own step, of the tensors with these ids."""
        groups = self.param_groups
        try:
            self.param_groups = [
                {**group, "params": [shard for shard in group["params"] if id(shard) in chosen]} for group in groups
            ]
            super().step()
        finally:
            self.param_groups = groups


def _parts_of(matrices: Iterable[Matrix]) -> Iterable[list[Matrix]]:
    """The matrices in parts that are equal on all ranks, by the size that all of them know."""
    part: list[Matrix] = []
    for one in matrices:
        if part and sum(other.elements for other in part) + one.elements > MOST_ELEMENTS:
            yield part
            part = []
        part.append(one)
    if part:
        yield part


def _take_back(shard: Tensor, old: Tensor, moment: Tensor, threshold: Tensor) -> None:
    """Writes ``old`` into a shard wherever its moment is below the threshold."""
    for new, kept, values in zip(shard.split(CHUNK), old.split(CHUNK), moment.split(CHUNK), strict=True):
        new.copy_(torch.where(_magnitudes(values) >= threshold, new, kept))


def kth_largest(moments: Sequence[Tensor | None], ranks: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """(matrices,) int64: the bits of the ``ranks[i]``-th largest absolute value, from 1, of each whole matrix.

    ``moments`` are this rank's parts, (elements,) fp32, of which each element is on one rank of the ``group``. Zeros
    that pad a matrix don't matter. Collective, one sum of counts for each of ``DIGITS``; exact, whatever the parts.
    """
    device = torch.cuda.current_device()
    left = torch.tensor(ranks, dtype=torch.int64, device=device)
    found, below = torch.zeros_like(left), sum(DIGITS)
    for width in DIGITS:
        below, digits = below - width, 1 << width
        counts = torch.zeros(len(moments), digits, dtype=torch.int64, device=device)
        for row, moment, higher in zip(counts, moments, found, strict=True):
            for values in () if moment is None else moment.split(CHUNK):
                row += _digit_counts(values, higher, below, digits)
        dist.all_reduce(counts, group=group)
        at_least = counts.flip(1).cumsum(1)  # column i: entries whose digit is one of the i + 1 highest
        place = (at_least < left[:, None]).sum(1, keepdim=True)
        digit = digits - 1 - place
        above = at_least.gather(1, place) - counts.gather(1, digit)
        left, found = left - above[:, 0], found * digits + digit[:, 0]
    return found


def _digit_counts(values: Tensor, higher: Tensor, below: int, digits: int) -> Tensor:
    """(digits,) int64: counts of each digit above the lowest ``below`` bits that follows the digits ``higher``."""
    # Values with other higher digits are counted below or above the range, which costs less than picking out the rest.
    digit = _magnitudes(values).bitwise_right_shift_(below).sub_(higher * digits - 1).clamp_(0, digits + 1)
    return torch.bincount(digit, minlength=digits + 2)[1:-1]


def _magnitudes(values: Tensor) -> Tensor:
    return values.view(torch.int32) & MAGNITUDE


def filter_updates(
    shards: HFTDistributedOptimizer, slots: Sequence[ParameterSlot], shape: ModelShape, fraction: float
) -> None:
    """Makes an optimizer that was built on ``MomentumFilteredAdamW`` update this fraction of every matrix.

    ``slots`` are all of this rank's parameters. At least one entry of a matrix is updated.
    """
    if shards.is_stub_optimizer:
        return  # A pipeline stage where nothing trains, on none of its ranks.
    adam, matrices = shards.optimizer, []
    assert isinstance(adam, MomentumFilteredAdamW)
    for slot in slots:
        if slot.parameter.dim() == 1 or not shards.plan.trains(slot.unit):
            continue
        shard = None
        if shards.range_of(slot.parameter) is not None:
            group, place = shards.model_param_group_index_map[slot.parameter]
            shard = adam.param_groups[group]["params"][place]
        entries = torch.Size(whole_shape(slot.unit, shape)).numel()
        moving = max(1, int(entries * fraction))
        matrices.append(Matrix(moving=moving, elements=slot.parameter.numel(), shard=shard))
    adam.filter(matrices, parallel_state.get_tensor_and_data_parallel_group())
