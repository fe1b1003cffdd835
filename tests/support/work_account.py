"""Counts the work of a piece of a model instead of trusting it: matrix products, collectives, tensors kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")
COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")


@dataclass
class _WatchedWork:
    """The handle of a collective, which notes when it is waited for."""

    work: dist.Work
    name: str
    events: list[str]

    def wait(self) -> None:
        self.events.append(f"{self.name} waited for")
        self.work.wait()


@dataclass
class Account(TorchDispatchMode):
    """In order, the matrix products and collectives that ran, and the tensors kept for the backward pass."""

    events: list[str] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            self.events.append("product")
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching(self) -> Iterator["Account"]:
        def watch(name: str) -> Any:
            original = getattr(dist, name)

            def collective(*args: Any, **kwargs: Any) -> Any:
                self.events.append(name)
                work = original(*args, **kwargs)
                return None if work is None else _WatchedWork(work, name, self.events)

            return patch.object(dist, name, collective)

        def keep(tensor: Tensor) -> Tensor:
            self.kept.append(tensor)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        gather, scatter, reduce = map(watch, COLLECTIVES)
        with gather, scatter, reduce, self, hooks:
            yield self

    def take(self) -> list[str]:
        """The events since the last call."""
        events = list(self.events)
        self.events.clear()  # handles of collectives hold this very list
        return events

    def kept_besides(self, *weights: Tensor) -> list[list[int]]:
        """Shapes of the tensors kept, once per memory, without the weights."""
        memories = {tensor.untyped_storage().data_ptr(): list(tensor.shape) for tensor in self.kept}
        own = {weight.untyped_storage().data_ptr() for weight in weights}
        return [shape for memory, shape in memories.items() if memory not in own]
