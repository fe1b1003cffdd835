"""Sums of gradients over tensor-parallel ranks that each hold the whole weight, but only a part of its gradient.

megatron-core has such sums for norms under sequence parallelism; the matrices of adapters need them without it, too.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from hft_megatron.model.adapters import PARTIAL_MARK


def finalize_gradients(model: Sequence[torch.nn.Module], *others: Any, **options: Any) -> None:
    """megatron-core's ``finalize_model_grads``, and one all-reduce of gradients marked with ``PARTIAL_MARK``.

    It comes afterwards, when the data-parallel sums are complete; only a rank's own part of these is used later.
    """
    finalize_model_grads(list(model), *others, **options)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    parts: list[Tensor] = [
        weight.main_grad  # type: ignore[attr-defined]  # megatron-core's
        for chunk in model
        for weight in chunk.parameters()
        if weight.requires_grad and getattr(weight, PARTIAL_MARK, False)
    ]
    if not parts:
        return
    total = torch.cat([part.view(-1) for part in parts])
    dist.all_reduce(total, group=group)
    for part, whole in zip(parts, total.split([part.numel() for part in parts]), strict=True):
        part.copy_(whole.view_as(part))
