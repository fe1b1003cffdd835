"""Values and mistakes of single ranks, known to all of them: what one rank raises, every rank raises.

A rank that raised alone would leave the others waiting in their next collective. All functions here are collective.
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from hft_megatron.errors import UserError

T = TypeVar("T")


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's ``value``, in the order of ranks in ``group``, or of all ranks."""
    values: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


def together(work: Callable[[], T]) -> list[T]:
    """What ``work`` returns on every rank, in their order; the UserError of the first that has one, on all ranks."""
    outcomes = gathered(_outcome(work))
    for outcome in outcomes:
        if isinstance(outcome, UserError):
            raise outcome
    return outcomes  # type: ignore[return-value]


def on_rank_0(work: Callable[[], T]) -> T:
    """What ``work`` returns on rank 0, which alone does it, or the UserError that it raises there, on every rank."""
    outcomes: list[T | UserError | None] = [_outcome(work) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcomes, src=0)
    if isinstance(outcomes[0], UserError):
        raise outcomes[0]
    return outcomes[0]  # type: ignore[return-value]


def _outcome(work: Callable[[], T]) -> T | UserError:
    try:
        return work()
    except UserError as error:
        return error
