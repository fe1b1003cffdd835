"""The cache of keys and values. Run: pytest tests/model/test_kv_cache.py"""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hft_megatron.model.kv_cache import KeyValueCache

LAYERS = 4


class OldOnes(TorchDispatchMode):
    """Notes at every selection of rows how many of the tensors are still there."""

    def __init__(self, tensors: list[Any]) -> None:
        super().__init__()
        self._tensors = tensors
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:
            self.found.append(sum(tensor() is not None for tensor in self._tensors))
        return func(*args, **(kwargs or {}))


def test_rows_are_dropped_with_no_more_than_one_layer_in_memory_twice() -> None:
    cache = KeyValueCache(room=5, lengths=torch.tensor([2, 4, 3]), longest=4)
    whole = torch.arange(9 * 2 * 4, dtype=torch.float32).reshape(9, 2, 4)
    for layer in range(LAYERS):
        cache.fill(layer, whole + layer, whole - layer, [2, 4, 3])
    old = [weakref.ref(tensor) for both in cache._layers.values() for tensor in both]
    with OldOnes(old) as noted:
        cache.keep([0, 2], longest=3)
    # The lengths first; then keys and values of each layer.
    assert noted.found == [2 * LAYERS, *(2 * left for left in range(LAYERS, 0, -1) for _ in range(2))]
    assert cache.lengths.tolist() == [2, 3]
    token = torch.full((2, 2, 4), -1.0)
    for layer in range(LAYERS):
        keys, values = cache.add(layer, token, token)
        assert torch.equal(keys[0, :, :2], (whole + layer)[:2].transpose(0, 1))
        assert torch.equal(values[1, :, :3], (whole - layer)[6:].transpose(0, 1))
