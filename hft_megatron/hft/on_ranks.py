"""A plan on the ranks of a run: applied to their parameters, the same on all of them, and what it freezes audited.

megatron-core lays out gradient buffers and optimizer groups from ``requires_grad`` at construction; a flag flipped
later is wrong in silence.

A rank with another plan would wait in other collectives than its peers, or train other weights, without an error.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hft_megatron.errors import RunFailed, UserError
from hft_megatron.hft.plan import Plan
from hft_megatron.parallel.consensus import gathered

if TYPE_CHECKING:
    # With megatron-core, which a plan on somebody else's model doesn't need.
    from hft_megatron.model.parameters import ParameterSlot


def apply_plan(slots: Sequence[ParameterSlot], plan: Plan) -> None:
    """Sets ``requires_grad`` of every parameter of this rank: True if its unit trains."""
    for slot in slots:
        assert not hasattr(slot.parameter, "main_grad"), f"{slot.hf_name} is still wrapped for an earlier plan"
        slot.parameter.requires_grad = plan.trains(slot.unit)


_RANKS_IN_MESSAGE = 4
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class _Holder:
    """Plan digest and place of one rank, for the others."""

    rank: int
    host: str
    coordinates: str
    digest: str


def check_agreement(plan: Plan, *, group: dist.ProcessGroup | None = None, coordinates: str) -> None:
    """Compare plan digests over all ranks of ``group`` (all ranks of the run when None); collective over it.

    ``coordinates`` say where this rank sits, such as ``"TP 1, PP 0, DP 3"``. Works on gloo and on NCCL alone (objects
    then travel through the current CUDA device, which must be set). Whole plans travel only after a difference.

    Raises the same ``UserError`` on every rank when any plan differs. It names each rank that differs from the plan
    that most ranks hold (on a tie, the one the lowest such rank holds), its host and coordinates, and the first
    differing unit or option.
    """
    me = _Holder(rank=dist.get_rank(), host=socket.gethostname(), coordinates=coordinates, digest=plan.digest)
    holders: list[_Holder] = gathered(me, group)
    # Counter keeps first-seen order and max takes the first maximum, so a tie goes to the lowest rank on every rank.
    digests = Counter(holder.digest for holder in holders)
    if len(digests) == 1:
        return
    common = max(digests, key=digests.__getitem__)
    plans: list[Plan] = gathered(plan, group)
    reference = next(index for index, holder in enumerate(holders) if holder.digest == common)
    raise UserError(_message(holders, plans, reference))


def _message(holders: Sequence[_Holder], plans: Sequence[Plan], reference: int) -> str:
    odd = [index for index, holder in enumerate(holders) if holder.digest != holders[reference].digest]
    clauses = [_difference(holders[index], plans[index], plans[reference]) for index in odd[:_RANKS_IN_MESSAGE]]
    if len(odd) > _RANKS_IN_MESSAGE:
        clauses.append(f"and {len(odd) - _RANKS_IN_MESSAGE} more")
    return (
        f"{len(odd)} of {len(holders)} ranks have another plan than rank {holders[reference].rank}: "
        f"{'; '.join(clauses)}; start every rank with the same options, files and version of hft_megatron."
    )


def _difference(holder: _Holder, plan: Plan, reference: Plan) -> str:
    """The rank, its place, and the first difference of its plan."""
    where = f"rank {holder.rank} on {holder.host} ({holder.coordinates})"
    name = reference.first_difference(plan)
    assert name is not None, f"the digests of {where} differ and the plans do not"
    if name not in {unit.name for unit in reference.units} & {unit.name for unit in plan.units}:
        return f"{where} differs first in {name}"
    here, there = ("trainable" if p.trains(name) else "frozen" for p in (plan, reference))
    if here == there:
        return f"{where} differs first in the size of {name}"
    return f"{where} differs first in {name}, which is {here} there instead of {there}"


_SPREAD = 2 * 0x1E3779B97F4A7C15
"""Twice an odd 61-bit number: position x this + 1 is odd, and different for every position below 2^63."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
"""Elements summed at a time, so that the fingerprint of an embedding needs no second embedding in memory."""


def fingerprint(tensor: Tensor) -> int:
    """A 64-bit fingerprint of a tensor's bits, taken where the tensor lies and alike on every device.

    The sum over all elements of bits x (an odd weight of the position), modulo 2^64. An odd number can be divided by
    modulo 2^64, so a change of one element, be it one bit, always changes the sum.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        positions = torch.arange(start, start + part.numel(), device=bits.device)
        total += (part * (positions * _SPREAD + 1)).sum()
    return int(total.item())


class Audit:
    """The frozen shards of one rank in one round."""

    def __init__(self, slots: Sequence[ParameterSlot], plan: Plan) -> None:
        """Takes the fingerprints; ``slots`` are all of this rank's parameters."""
        self._frozen = [slot for slot in slots if not plan.trains(slot.unit)]
        self._order = {unit.name: position for position, unit in enumerate(plan.units)}
        self._before = [fingerprint(slot.parameter) for slot in self._frozen]

    @property
    def shards(self) -> int:
        """Number of shards that this rank audits."""
        return len(self._frozen)

    def verify(self, *, coordinates: str) -> None:
        """Compares with the start of the round; collective over all ranks.

        Raises the same RunFailed on every rank when a frozen shard anywhere has changed: it names the first such unit
        in the model's order, and the rank, host and ``coordinates`` of the shard.
        """
        pairs = zip(self._frozen, self._before, strict=True)
        moved = [slot.unit for slot, before in pairs if fingerprint(slot.parameter) != before]
        first = min(moved, key=self._order.__getitem__, default=None)
        mine = None if first is None else (self._order[first], first, socket.gethostname(), coordinates, len(moved))
        guilty = [(entry[0], rank, entry) for rank, entry in enumerate(gathered(mine)) if entry is not None]
        if not guilty:
            return
        _, rank, (_, unit, host, where, _) = min(guilty, key=lambda one: one[:2])
        total = sum(entry[4] for _, _, entry in guilty)
        raise RunFailed(
            f"the audit found that {total} frozen shard{'s' if total > 1 else ''} changed, first {unit} on rank {rank} "
            f"on {host} ({where}); something outside the optimizer wrote to it, or memory failed."
        )
