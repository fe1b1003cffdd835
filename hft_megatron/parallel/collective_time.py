"""Times the collectives of tensor-parallel ranks in a step, so that a rank's own work can be told from its waits."""

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel import layers, mappings

from hft_megatron.parallel.step_clock import StepClock

_FUNCTIONS: tuple[tuple[ModuleType, str], ...] = (
    (dist, "all_reduce"),
    (dist, "all_gather_into_tensor"),
    (dist, "reduce_scatter_tensor"),
    # Bound when megatron-core was imported.
    *((module, name) for module in (layers, mappings) for name in ("dist_all_gather_func", "dist_reduce_scatter_func")),
)
"""Through which forward and backward passes of megatron-core, and of this package, talk to tensor-parallel ranks."""


class TimedHandle:
    """A launched collective, to be waited for, with a context in which that is done."""

    def __init__(self, wait: Callable[[], Any], timed: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._wait = wait
        self._timed = timed

    def wait(self) -> None:
        """Waits for the collective."""
        with self._timed():
            self._wait()


@contextlib.contextmanager
def timed_collectives(clock: StepClock, group: dist.ProcessGroup) -> Iterator[None]:
    """Within it, what collectives on ``group`` hold this rank up is noted by ``clock``; others are left alone.

    The functions are swapped meanwhile, not for good: other users of torch in this process keep theirs.
    """
    if group.size() == 1:
        yield
        return
    originals = [getattr(module, name) for module, name in _FUNCTIONS]
    for (module, name), original in zip(_FUNCTIONS, originals, strict=True):
        setattr(module, name, _timed(original, clock, group))
    try:
        yield
    finally:
        for (module, name), original in zip(_FUNCTIONS, originals, strict=True):
            setattr(module, name, original)


def _timed(collective: Callable[..., Any], clock: StepClock, group: dist.ProcessGroup) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("group") is not group:
            return collective(*args, **kwargs)
        with clock.collective():
            work = collective(*args, **kwargs)
        return work if work is None else TimedHandle(work.wait, clock.collective)

    return call
