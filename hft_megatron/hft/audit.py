"""Proof that what rests does rest: fingerprints of every resting shard, taken at the start of a round and compared."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from hft_megatron.errors import RunFailed
from hft_megatron.hft.plan import Plan

if TYPE_CHECKING:
    # With megatron-core, which a plan on somebody else's model doesn't need.
    from hft_megatron.model.parameters import ParameterSlot

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
    """The resting shards of one rank in one round."""

    def __init__(self, slots: Sequence[ParameterSlot], plan: Plan) -> None:
        """Takes the fingerprints; ``slots`` are all of this rank's parameters."""
        self._resting = [slot for slot in slots if not plan.trains(slot.unit)]
        self._order = {unit.name: position for position, unit in enumerate(plan.units)}
        self._before = [fingerprint(slot.parameter) for slot in self._resting]

    @property
    def shards(self) -> int:
        """How many this rank watches."""
        return len(self._resting)

    def verify(self, *, coordinates: str) -> None:
        """Compares with the start of the round; collective over all ranks.

        Raises the same RunFailed on every rank when a resting shard anywhere has changed: it names the first such unit
        in the model's order, and the rank, host and ``coordinates`` of the shard.
        """
        pairs = zip(self._resting, self._before, strict=True)
        moved = [slot.unit for slot, before in pairs if fingerprint(slot.parameter) != before]
        first = min(moved, key=self._order.__getitem__, default=None)
        found: list[tuple[int, str, str, str, int] | None] = [None] * dist.get_world_size()
        mine = None if first is None else (self._order[first], first, socket.gethostname(), coordinates, len(moved))
        dist.all_gather_object(found, mine)
        guilty = [(entry[0], rank, entry) for rank, entry in enumerate(found) if entry is not None]
        if not guilty:
            return
        _, rank, (_, unit, host, where, _) = min(guilty, key=lambda one: one[:2])
        total = sum(entry[4] for _, _, entry in guilty)
        raise RunFailed(
            f"the audit found {total} resting shard{'s' if total > 1 else ''} changed, first {unit} on rank {rank} "
            f"on {host} ({where}); something outside the optimizer wrote to it, or memory failed."
        )
