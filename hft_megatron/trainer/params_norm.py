"""The norm of all weights of a model over its ranks, for the log."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from hft_megatron.model.parameters import ParameterSlot, parameter_slots
from hft_megatron.trainer.run import Run


def params_norm(run: Run) -> float:
    """2-norm of every weight of the model, counted once each, the same on all ranks; collective, 8 bytes.

    Of trainable weights the fp32 values that the optimizer updates, of frozen ones the weights themselves: nothing has
    to be gathered. Each tensor's norm is taken in fp32, their sum in fp64.
    """
    placement, trained = run.placement, run.wrapped.shards.updated_shards()
    tensors: list[Tensor] = []
    for slot in parameter_slots(run.wrapped.modules):
        if _is_copy(slot) or (slot.cut is None and placement.tensor_rank > 0):
            continue
        if slot.parameter.requires_grad:
            tensors += [trained[slot.parameter]] if slot.parameter in trained else []
        elif placement.data_rank == 0:
            tensors.append(slot.parameter.detach())
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32).double() for tensor in tensors]
    total = torch.zeros((), dtype=torch.float64, device=placement.device)
    if norms:
        total += torch.stack(norms).square().sum()
    dist.all_reduce(total)
    return math.sqrt(float(total))


def _is_copy(slot: ParameterSlot) -> bool:
    """Whether it is the head of a tied embedding, which the first pipeline stage holds too."""
    return slot.unit == "model.embed_tokens" and slot.local_name.startswith("output_layer")
