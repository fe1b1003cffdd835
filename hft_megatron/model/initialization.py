"""Random weights that do not depend on the layout: each matrix is drawn whole from its own seed, then sliced."""

import hashlib
import math
from collections.abc import Sequence

import torch

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.parameter_names import whole_shape
from hft_megatron.model.parameters import ParameterSlot, local_slice, parameter_slots
from hft_megatron.parallel.groups import Placement


def initialize_weights(chunks: Sequence[LlamaModel], shape: ModelShape, *, seed: int, placement: Placement) -> None:
    """Fills every parameter: norms with one, matrices from N(0, std), output projections from N(0, std / sqrt(2 L)).

    The scaling of ``o_proj`` and ``down_proj`` is Megatron's default (GPT-2's residual scaling). Rows that only pad the
    vocabulary are zero. The same seed gives the same model on every layout of one kind of device.
    """
    for slot in parameter_slots(chunks):
        with torch.no_grad():
            if slot.parameter.dim() == 1:
                slot.parameter.fill_(1.0)
            else:
                slot.parameter.copy_(local_slice(_draw(slot, shape, seed), slot, placement))


def _draw(slot: ParameterSlot, shape: ModelShape, seed: int) -> torch.Tensor:
    """The whole matrix as Hugging Face has it, fp32 on CPU."""
    std = shape.init_method_std
    if slot.unit.endswith(("o_proj", "down_proj")):
        std /= math.sqrt(2 * shape.num_layers)
    digest = hashlib.sha256(f"{seed}:{slot.unit}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(whole_shape(slot.unit, shape)).normal_(0.0, std, generator=generator)
