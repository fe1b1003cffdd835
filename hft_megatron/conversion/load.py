"""Hugging Face folder -> this rank's parameters, each rank reading only its own slices."""

import hashlib
from collections.abc import Sequence

import torch

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.hft.units import units_of
from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.parameter_names import whole_shape
from hft_megatron.model.parameters import ParameterSlot, local_range, parameter_slots
from hft_megatron.parallel.groups import Placement


def check_weights(folder: str, shape: ModelShape) -> str:
    """Raises UserError unless ``folder`` holds every tensor of the model in a shape and data type that can be loaded.

    Returns a sha256 over the first entries of every tensor, which tells models of one shape apart. Reads the files'
    headers and those entries only, so that a mistake is found before a model is built.
    """
    digest = hashlib.sha256()
    with HuggingFaceWeights(folder) as weights:
        for unit in units_of(shape):
            name = f"{unit.name}.weight"
            weights.check_shape(name, whole_shape(unit.name, shape))
            first = weights.read(name, dim=0, start=0, length=1)
            digest.update(f"{name} {first.dtype}".encode() + first.float().numpy().tobytes())
    return digest.hexdigest()


def load_weights(folder: str, chunks: Sequence[LlamaModel], shape: ModelShape, placement: Placement) -> None:
    """Fills every parameter of this rank from safetensors, rounding to the parameter's dtype where it is coarser.

    Rows that only pad the vocabulary become zero. Raises UserError for a missing or misshapen tensor.
    """
    with HuggingFaceWeights(folder) as weights:
        for slot in parameter_slots(chunks):
            weights.check_shape(slot.hf_name, whole_shape(slot.unit, shape))
            with torch.no_grad():
                _fill(slot, weights, shape, placement)


def _fill(slot: ParameterSlot, weights: HuggingFaceWeights, shape: ModelShape, placement: Placement) -> None:
    if slot.cut is None:
        slot.parameter.copy_(weights.read(slot.hf_name))
        return
    start, real = local_range(slot, whole_shape(slot.unit, shape)[slot.cut], placement)
    slot.parameter.zero_()
    if real > 0:
        part = weights.read(slot.hf_name, dim=slot.cut, start=start, length=real)
        slot.parameter.narrow(slot.cut, 0, real).copy_(part)
