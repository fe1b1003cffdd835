"""Bytes that data-parallel ranks send and the time a rank waits for it, measured around megatron-core's collectives."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from megatron.core.distributed import param_and_grad_buffer
from torch import Tensor
from torch import distributed as dist

from hft_megatron.parallel.direct_exchange import Exchanges, is_direct
from hft_megatron.parallel.step_clock import ALL_GATHER_WAIT, REDUCE_SCATTER_WAIT, StepClock, TimedHandle


class Traffic:
    """Counts a run's bytes and times its waits, over all rounds: the wrapper of a new round is given the old one's.

    Bytes are those passed to ``reduce_scatter_tensor`` and ``all_gather_into_tensor`` on data-parallel groups of more
    than one rank; on a group of one both are local copies and don't count. Times go to ``clock``: the time that a rank
    is held up in the start and the end of a collective. Without overlap that is all of its time, with overlap the
    remaining wait. Checking and scaling gradients before a reduction is not part of it.
    """

    def __init__(self) -> None:
        self.clock = StepClock()
        self._reduce_scatter_bytes = 0
        self._all_gather_bytes = 0

    def take_bytes(self) -> tuple[int, int]:
        """Bytes passed to reduce-scatter and filled by all-gather on this rank since the last call."""
        taken = self._reduce_scatter_bytes, self._all_gather_bytes
        self._reduce_scatter_bytes = self._all_gather_bytes = 0
        return taken

    def count(self, *, reduce_scatter: int = 0, all_gather: int = 0) -> None:
        """Adds bytes of one collective."""
        self._reduce_scatter_bytes += reduce_scatter
        self._all_gather_bytes += all_gather

    @contextlib.contextmanager
    def lending_bucket_groups(self) -> Iterator[None]:
        """Within it, ``DistributedDataParallel`` is built with bucket groups that report here.

        megatron-core names its class and has no hook for another, so ours takes its place meanwhile.
        """
        original = param_and_grad_buffer._ParamAndGradBucketGroup

        def build(*args: Any, **kwargs: Any) -> _MeteredBucketGroup:
            return _MeteredBucketGroup(*args, traffic=self, **kwargs)

        param_and_grad_buffer._ParamAndGradBucketGroup = build
        try:
            yield
        finally:
            param_and_grad_buffer._ParamAndGradBucketGroup = original


# The class is bound here, before anything is replaced.
class _MeteredBucketGroup(param_and_grad_buffer._ParamAndGradBucketGroup):
    """A bucket group whose collectives are counted and timed.

    The functions that finish a collective call both start functions if needed, so overriding these covers everything.
    """

    def __init__(self, *args: Any, traffic: Traffic, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._traffic = traffic

    def start_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        with _metered_collectives(self._traffic, REDUCE_SCATTER_WAIT):
            super().start_grad_sync(*args, **kwargs)

    def start_param_sync(self, *args: Any, **kwargs: Any) -> None:
        with _metered_collectives(self._traffic, ALL_GATHER_WAIT):
            super().start_param_sync(*args, **kwargs)


@contextlib.contextmanager
def _metered_collectives(traffic: Traffic, section: str) -> Iterator[None]:
    """Within it, the functions through which megatron-core's bucket groups communicate count and time.

    They are swapped for the length of one call, not for good: other users of megatron-core in this process keep theirs.
    """
    reduce_scatter = param_and_grad_buffer.dist_reduce_scatter_func
    all_gather = param_and_grad_buffer.dist_all_gather_func
    coalescing = param_and_grad_buffer._coalescing_manager
    exchanges = Exchanges()

    def counting_reduce_scatter(output: Tensor, input: Tensor, *, op: Any, group: Any, async_op: bool) -> Any:
        traffic.count(reduce_scatter=input.nbytes if group.size() > 1 else 0)
        if not is_direct(group):
            return reduce_scatter(output, input, op=op, group=group, async_op=async_op)
        assert op == dist.ReduceOp.SUM
        exchanges.reduce_scatter(output, input, group, in_background=async_op)
        return None

    def counting_all_gather(output: Tensor, input: Tensor, *, group: Any, async_op: bool) -> Any:
        traffic.count(all_gather=output.nbytes if group.size() > 1 else 0)
        if not is_direct(group):
            return all_gather(output, input, group=group, async_op=async_op)
        exchanges.all_gather(output, input, group, in_background=async_op)
        return None

    @contextlib.contextmanager
    def timing_coalescing(group: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        launched = contextlib.nullcontext(exchanges) if is_direct(group) else coalescing(group, *args, **kwargs)
        if group.size() == 1:
            with launched as handle:
                yield handle
            return
        # torch's manager only notes the calls inside; it launches them when it ends, and waits for those without
        # overlap.
        with traffic.clock.section(section), launched as handle:
            yield TimedHandle(handle.wait, partial(traffic.clock.section, section))

    with (
        _replaced("dist_reduce_scatter_func", counting_reduce_scatter),
        _replaced("dist_all_gather_func", counting_all_gather),
        _replaced("_coalescing_manager", timing_coalescing),
    ):
        yield


@contextlib.contextmanager
def _replaced(name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(param_and_grad_buffer, name)
    setattr(param_and_grad_buffer, name, function)
    try:
        yield
    finally:
        setattr(param_and_grad_buffer, name, original)
