"""What data-parallel ranks really exchange, counted by the tests themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor

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
