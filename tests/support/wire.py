"""Bytes that data-parallel ranks really exchange, counted by the tests themselves."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hft_megatron.parallel.direct_exchange import AllGather, ReduceScatter


@contextmanager
def sent_bytes() -> Iterator[dict[str, int]]:
    """Adds up the buffers of both collectives on groups of more than one rank."""
    counts = {"reduce_scatter": 0, "all_gather": 0}
    start_sum, start_gather = ReduceScatter.__init__, AllGather.__init__

    def counting_sum(self: ReduceScatter, output: Tensor, input: Tensor, group: Any, **kwargs: Any) -> None:
        counts["reduce_scatter"] += input.nbytes if group.size() > 1 else 0
        start_sum(self, output, input, group, **kwargs)

    def counting_gather(self: AllGather, output: Tensor, input: Tensor, group: Any) -> None:
        counts["all_gather"] += output.nbytes if group.size() > 1 else 0
        start_gather(self, output, input, group)

    with patch.object(ReduceScatter, "__init__", counting_sum), patch.object(AllGather, "__init__", counting_gather):
        yield counts


class Messages(TorchDispatchMode):
    """``bytes``: bytes that this rank gives to its process groups of more than one rank, by the name of their operator
    (``send``, ``allreduce_``, ...); received ones don't count."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and not name.startswith("recv"):
            leaves = tree_leaves((args, kwargs))
            if _group_size(leaves) > 1:
                self.bytes[name] += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def _group_size(leaves: list[Any]) -> int:
    objects = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
    [group] = [one for one in objects if "ProcessGroup" in str(one._type())]
    return int(dist.ProcessGroup.unbox(group).size())
