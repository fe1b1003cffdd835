"""What megatron-core really sends, counted by the tests themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from megatron.core.distributed import param_and_grad_buffer


@contextmanager
def sent_bytes() -> Iterator[dict[str, int]]:
    """Adds up what megatron-core gives to both collectives on data-parallel groups of more than one rank."""
    counts = {"reduce_scatter": 0, "all_gather": 0}
    reduce_scatter = param_and_grad_buffer.dist_reduce_scatter_func
    all_gather = param_and_grad_buffer.dist_all_gather_func

    def counting_reduce_scatter(output, input, *, group, **kwargs):
        counts["reduce_scatter"] += input.nbytes if group.size() > 1 else 0
        return reduce_scatter(output, input, group=group, **kwargs)

    def counting_all_gather(output, input, *, group, **kwargs):
        counts["all_gather"] += output.nbytes if group.size() > 1 else 0
        return all_gather(output, input, group=group, **kwargs)

    with (
        patch.object(param_and_grad_buffer, "dist_reduce_scatter_func", counting_reduce_scatter),
        patch.object(param_and_grad_buffer, "dist_all_gather_func", counting_all_gather),
    ):
        yield counts
