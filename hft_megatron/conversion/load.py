"""Hugging Face folder -> this rank's parameters, each rank reading only its own slices."""

from collections.abc import Sequence

import torch

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.hft.units import units_of
from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.parameters import ParameterSlot, parameter_slots, whole_shape
from hft_megatron.parallel.groups import Placement


def check_weights(folder: str, shape: ModelShape) -> None:
    """Raises UserError unless ``folder`` holds every tensor of the model in a shape and data type that can be loaded.

    Reads the files' headers only, so that a mistake is found before a model is built.
    """
    with HuggingFaceWeights(folder) as weights:
        for unit in units_of(shape):
            name = f"{unit.name}.weight"
            weights.check_shape(name, whole_shape(unit.name, shape))
            weights.dtype(name)


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
    parameter = slot.parameter
    if slot.cut is None:
        parameter.copy_(weights.read(slot.hf_name))
        return
    whole = whole_shape(slot.unit, shape)[slot.cut]
    size = parameter.size(slot.cut)
    start = min(placement.tensor_rank * size, whole)
    real = min(size, whole - start)
    if real > 0:
        part = weights.read(slot.hf_name, dim=slot.cut, start=start, length=real)
        parameter.narrow(slot.cut, 0, real).copy_(part)
    if real < size:
        assert slot.is_vocab, "only the vocabulary is padded"
        parameter.narrow(slot.cut, real, size - real).zero_()
