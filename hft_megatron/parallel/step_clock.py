"""Times of a step by section: each moment belongs to one section, so that they add up to at most the step.

On CUDA the times are the stream's, from events that are read once the step is over; elsewhere the host's.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers, mappings
from torch.profiler import record_function

FORWARD = "forward"
BACKWARD = "backward"
REDUCE_SCATTER_WAIT = "reduce-scatter wait"
ALL_GATHER_WAIT = "all-gather wait"
OPTIMIZER = "optimizer"
SECTIONS = (FORWARD, BACKWARD, REDUCE_SCATTER_WAIT, ALL_GATHER_WAIT, OPTIMIZER)
OTHER = "other"
"""Time outside all sections: assembling the batch, clearing, checking and scaling gradients, pipeline waits, the loss
over ranks. With overlapped reduction gradients are checked and scaled within the backward pass, and count there."""

_MEGATRON_NAMES: Mapping[str, str] = {"forward-compute": FORWARD, "backward-compute": BACKWARD}
"""megatron-core's timers of one micro-batch on one model chunk, as its schedules call them."""


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Milliseconds of one step on this rank."""

    total: float
    """Time by the host's clock, from an idle device to an idle device."""
    sections: Mapping[str, float]
    """Times of each of ``SECTIONS``."""
    in_collectives: float = 0.0
    """Part of forward and backward in collectives of tensor-parallel ranks, mostly waiting for them."""

    @property
    def compute(self) -> float:
        """Time of this rank's own forward and backward work, without waits for others."""
        return self.sections[FORWARD] + self.sections[BACKWARD] - self.in_collectives

    @property
    def other(self) -> float:
        """Time outside all sections."""
        return self.total - sum(self.sections.values())


class StepClock:
    """Times sections between ``begin`` and ``end``; outside of them, as in a validation, it does nothing.

    An inner section pauses the outer one: a wait for gathered parameters within the forward pass is the wait's time
    and not the forward pass's. Recording synchronises nothing; ``begin`` and ``end`` wait for the device, once each.
    """

    def __init__(self) -> None:
        self._on_stream = torch.cuda.is_available()
        self._marks: list[tuple[str, bool, Any]] = []
        """Section from each moment on, and whether the time is spent in one of its collectives."""
        self._open: list[str] = []
        self._begun: float | None = None
        self.annotates = False
        """True if sections are also named ranges in a profiler's trace, which costs time."""
        self._ranges: list[Any] = []

    def begin(self) -> None:
        """Starts a step, and discards an earlier one that an exception cut short."""
        self._wait_for_device()
        self._marks, self._open, self._ranges = [], [], []
        self._begun = time.perf_counter()
        self._mark(OTHER)

    def end(self) -> StepTimes:
        """Ends the step and returns its times in milliseconds."""
        assert self._begun is not None, "a step ends that never began"
        assert not self._open, f"sections still open: {self._open}"
        self._mark(OTHER)
        self._wait_for_device()
        total = (time.perf_counter() - self._begun) * 1e3
        sections, in_collectives = dict.fromkeys((*SECTIONS, OTHER), 0.0), 0.0
        for (section, collective, start), (_, _, stop) in zip(self._marks, self._marks[1:], strict=False):
            milliseconds = start.elapsed_time(stop) if self._on_stream else (stop - start) * 1e3
            sections[section] += milliseconds
            if collective:
                in_collectives += milliseconds
        del sections[OTHER]  # it follows from the total, which holds the host's part as well
        self._marks, self._begun = [], None
        return StepTimes(total=total, sections=sections, in_collectives=in_collectives)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time within it belongs to ``name``, one of ``SECTIONS``."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Time within it stays in the open section; in a forward or backward pass it counts as time in collectives."""
        open = self._open[-1] if self._open else OTHER
        if self._begun is None or open not in (FORWARD, BACKWARD):
            yield
            return
        self._mark(open, collective=True)
        try:
            yield
        finally:
            self._mark(open)

    def enter(self, name: str) -> None:
        """Opens a section; ``leave`` closes it. For callers that cannot hold a ``with`` open."""
        if self._begun is not None:
            self._open.append(name)
            self._mark(name)
            self._ranges.append(record_function(name) if self.annotates else contextlib.nullcontext())
            self._ranges[-1].__enter__()

    def leave(self) -> None:
        """Closes the innermost section."""
        if self._begun is not None:
            self._ranges.pop().__exit__(None, None, None)
            self._open.pop()
            self._mark(self._open[-1] if self._open else OTHER)

    def _wait_for_device(self) -> None:
        if self._on_stream:
            torch.cuda.synchronize()

    def _mark(self, section: str, *, collective: bool = False) -> None:
        # The current stream, also in autograd's own thread, is the one that computes and that a wait holds up.
        moment: Any = time.perf_counter()
        if self._on_stream:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._marks.append((section, collective, moment))

    def megatron_timers(self, name: str, log_level: int | None = None) -> "_MegatronTimer":
        """Function for megatron-core's ``config.timers``; timers of anything but micro-batches do nothing."""
        return _MegatronTimer(self, _MEGATRON_NAMES.get(name))


class _MegatronTimer:
    """One timer in megatron-core's interface; never with a barrier, which would be measured, too."""

    def __init__(self, clock: StepClock, section: str | None) -> None:
        self._clock = clock
        self._section = section

    def start(self, barrier: bool = False) -> None:
        if self._section is not None:
            self._clock.enter(self._section)

    def stop(self, barrier: bool = False) -> None:
        if self._section is not None:
            self._clock.leave()


_FUNCTIONS: tuple[tuple[ModuleType, str], ...] = (
    (dist, "all_reduce"),
    (dist, "all_gather_into_tensor"),
    (dist, "reduce_scatter_tensor"),
    # Bound when megatron-core was imported.
    *((module, name) for module in (layers, mappings) for name in ("dist_all_gather_func", "dist_reduce_scatter_func")),
)
"""Functions through which forward and backward passes of megatron-core and of this package reach tensor-parallel
ranks."""


class TimedHandle:
    """A launched collective, whose wait happens inside a context."""

    def __init__(self, wait: Callable[[], Any], timed: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._wait = wait
        self._timed = timed

    def wait(self) -> None:
        """Waits for the collective."""
        with self._timed():
            self._wait()


@contextlib.contextmanager
def timed_collectives(clock: StepClock, group: dist.ProcessGroup) -> Iterator[None]:
    """Within it, ``clock`` records the time of collectives on ``group``; others are left alone.

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
