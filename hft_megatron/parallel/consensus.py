"""Values and errors of single ranks, shared with all: an error of one rank is raised on every rank.

A rank that raised alone would leave the others waiting in their next collective. All functions here are collective.
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from hft_megatron.errors import RunFailed, UserError

T = TypeVar("T")
Failure = UserError | RunFailed
"""Errors that are shared with all ranks."""


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's ``value``, in the order of ranks in ``group``, or of all ranks."""
    values: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


def together(work: Callable[[], T]) -> list[T]:
    """Results of ``work`` on every rank, in their order. Raises the first rank's UserError or RunFailed on all of
    them."""
    outcomes = gathered(_outcome(work))
    for outcome in outcomes:
        if isinstance(outcome, Failure):
            raise outcome
    return outcomes  # type: ignore[return-value]


def on_rank_0(work: Callable[[], T]) -> T:
    """Result of ``work``, which runs on rank 0 alone, on all ranks; likewise its UserError or RunFailed."""
    outcomes: list[T | Failure | None] = [_outcome(work) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcomes, src=0)
    if isinstance(outcomes[0], Failure):
        raise outcomes[0]
    return outcomes[0]  # type: ignore[return-value]


def _outcome(work: Callable[[], T]) -> T | Failure:
    try:
        return work()
    except (UserError, RunFailed) as error:
        return error
