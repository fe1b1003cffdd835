"""Checks that all ranks hold the same plan, and names the rank that does not.

A rank with another plan would wait in other collectives than its peers, or train other weights, without any error.
"""

import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan

_RANKS_IN_MESSAGE = 4
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class _Holder:
    """What one rank tells the others about itself."""

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
    holders: list[_Holder] = _gather(me, group)
    # Counter keeps first-seen order and max takes the first maximum, so a tie goes to the lowest rank on every rank.
    digests = Counter(holder.digest for holder in holders)
    if len(digests) == 1:
        return
    common = max(digests, key=digests.__getitem__)
    plans: list[Plan] = _gather(plan, group)
    reference = next(index for index, holder in enumerate(holders) if holder.digest == common)
    raise UserError(_message(holders, plans, reference))


def _gather(value: _Value, group: dist.ProcessGroup | None) -> list[_Value]:
    """Every rank's ``value``, in the order of ranks in ``group``."""
    gathered: list[_Value | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered  # type: ignore[return-value]


def _message(holders: Sequence[_Holder], plans: Sequence[Plan], reference: int) -> str:
    odd = [index for index, holder in enumerate(holders) if holder.digest != holders[reference].digest]
    clauses = [_difference(holders[index], plans[index], plans[reference]) for index in odd[:_RANKS_IN_MESSAGE]]
    if len(odd) > _RANKS_IN_MESSAGE:
        clauses.append(f"and {len(odd) - _RANKS_IN_MESSAGE} more")
    return (
        f"{len(odd)} of {len(holders)} ranks hold another plan than rank {holders[reference].rank}: "
        f"{'; '.join(clauses)}; start every rank with the same options, files and version of hft_megatron."
    )


def _difference(holder: _Holder, plan: Plan, reference: Plan) -> str:
    """Which rank, where, and what is different there."""
    where = f"rank {holder.rank} on {holder.host} ({holder.coordinates})"
    name = reference.first_difference(plan)
    assert name is not None, f"the digests of {where} differ and the plans do not"
    if name not in {unit.name for unit in reference.units} & {unit.name for unit in plan.units}:
        return f"{where} differs first in {name}"
    here, there = ("trains" if p.trains(name) else "rests" for p in (plan, reference))
    if here == there:
        return f"{where} differs first in the size of {name}"
    return f"{where} differs first in {name}, which {here} there instead of {there}"
