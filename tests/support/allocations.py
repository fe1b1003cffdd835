"""Counts the memory that tensors take on a CPU, as torch.cuda.max_memory_allocated does on a GPU."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Bytes of storages that operators made within it and that are still alive, and their peak.

    ``sizes``: bytes of every storage that was made, in order, whether it is alive or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.sizes: list[int] = []
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            # Views and in-place writes are no new memory.
            if isinstance(leaf, Tensor) and _storage(leaf) not in given | self._alive:
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = _storage(tensor), storage.nbytes()
        self._alive.add(key)
        self.sizes.append(size)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
