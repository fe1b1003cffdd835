"""The parameters of a live model with their names from ``parameter_names``, and how each is cut over tensor ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.parameter_names import ParameterName, name_of
from hft_megatron.parallel.groups import Placement


@dataclass(frozen=True, kw_only=True)
class ParameterSlot(ParameterName):
    """One local parameter with its name and place."""

    parameter: torch.nn.Parameter

    @property
    def hf_name(self) -> str:
        return f"{self.unit}.weight"


def parameter_slots(chunks: Sequence[LlamaModel]) -> Iterator[ParameterSlot]:
    """The parameters of this rank, in the chunks' order. Raises KeyError for one that the table does not know."""
    for chunk in chunks:
        # A layer knows its place in the whole model (from 1), its index only that in the chunk.
        first_layer = chunk.decoder.layers[0].layer_number - 1
        for local_name, parameter in chunk.named_parameters():
            name = name_of(local_name, first_layer=first_layer, tie_embeddings=chunk.shape.tie_embeddings)
            yield ParameterSlot(parameter=parameter, **vars(name))


def local_range(slot: ParameterSlot, whole: int, placement: Placement) -> tuple[int, int]:
    """(start, length) of this tensor rank's part of ``whole`` entries; entries beyond that pad the vocabulary."""
    assert slot.cut is not None
    size = slot.parameter.size(slot.cut)
    start = min(placement.tensor_rank * size, whole)
    real = min(size, whole - start)
    assert real == size or slot.is_vocab, "only the vocabulary is padded"
    return start, real


def local_slice(whole: torch.Tensor, slot: ParameterSlot, placement: Placement) -> torch.Tensor:
    """This tensor rank's part of a whole Hugging Face tensor; rows that pad the vocabulary are zero."""
    if slot.cut is None:
        return whole
    start, real = local_range(slot, whole.size(slot.cut), placement)
    part = whole.narrow(slot.cut, start, real)
    missing = slot.parameter.size(slot.cut) - real
    return torch.cat([part, part.new_zeros((missing, *part.shape[1:]))]) if missing else part
