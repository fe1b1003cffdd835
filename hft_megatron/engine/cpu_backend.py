"""Makes megatron-core's CUDA assumptions hold on a machine without CUDA: the same engine then trains on CPU and gloo.

megatron-core 0.16 takes ``torch.cuda`` for granted: the current device, streams, random states, ``device="cuda"`` in
factory calls, and the ``torch.cuda.*`` names that ``Tensor.type()`` reports. Upstream refuses CPU tensors
(``distrib_optimizer.py``: "Wrapped parameters must be one of ..."). This is the only module that deals with it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Reads ``device="cuda"``, ``.cuda()`` and ``.type()`` as megatron-core would on a GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **kwargs)


class _NoStream:
    """Stands for a CUDA stream or event where all work is synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass


def _cpu_random_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_random_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


_active = False
_mode = _CudaMeansCpu()


def activate() -> None:
    """Turns the CPU backend on for this process; a second call does nothing.

    Called by name from entry points and test workers, never on import. Asserts that CUDA is absent: a GPU machine
    uses CUDA itself.
    """
    global _active
    if _active:
        return
    assert not torch.cuda.is_available(), "the CPU backend must not shadow a CUDA device"
    from megatron.core.tensor_parallel import random as tensor_parallel_random

    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda device=None: None
    cuda.current_stream = lambda device=None: _NoStream()
    cuda.default_stream = lambda device=None: _NoStream()
    cuda.Stream = _NoStream
    cuda.Event = _NoStream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = _cpu_random_state
    cuda.set_rng_state = _set_cpu_random_state
    tensor_parallel_random._get_cuda_rng_state = _cpu_random_state
    tensor_parallel_random._set_cuda_rng_state = _set_cpu_random_state
    # Entered for the life of the process: a context manager around the run would not reach threads' later calls anyway.
    _mode.__enter__()
    _active = True


@contextlib.contextmanager
def out_of_the_way() -> Iterator[None]:
    """Suspends the hook on every call of torch, for work that names no device but that of its tensors.

    Without CUDA each call takes some microseconds less; where the backend isn't active nothing changes.
    """
    if not _active:
        yield
        return
    _mode.__exit__(None, None, None)
    try:
        yield
    finally:
        _mode.__enter__()


def has_fast_bf16() -> bool:
    """Return whether a run on this machine alone uses bf16 without --bf16 or --no-bf16."""
    return torch.cuda.is_available() or cpu_has_fast_bf16()


def cpu_has_fast_bf16() -> bool:
    """Return whether the CPU has fast bf16 matrix products: AMX or AVX512-BF16, read from /proc/cpuinfo.

    Without either, bf16 on a CPU is emulated and slower than fp32 (measured about 5x faster with AMX, slower without).
    """
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            flags = next((line.split() for line in lines if line.startswith("flags")), [])
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
