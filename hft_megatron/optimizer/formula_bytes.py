"""What a rank would send and hold if it trained other units than it does: full fine-tuning, for the bill."""

from collections.abc import Callable
from dataclasses import dataclass

from hft_megatron.model.parameters import parameter_slots
from hft_megatron.optimizer.wire_bytes import TrainedShard, buffer_elements
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.parallel.groups import Placement

GRADIENT_WIDTH = 4
"""Bytes of an element; gradients, masters and both moments are fp32 whatever the weights are."""


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """Bytes of one rank."""

    reduced: int
    """Passed to reduce-scatter over data-parallel ranks."""
    gathered: int
    """Filled by all-gather over data-parallel ranks."""
    gradients: int
    """Gradient buffers, padding included."""
    masters: int
    """fp32 master weights beside bf16 weights; an fp32 weight is its own master."""
    moments: int
    """Adam's first and second."""


def formula_bytes(wrapped: WrappedModel, placement: Placement, trains: Callable[[str], bool]) -> RankBytes:
    """What this rank would send in one step and hold, were exactly the units trained for which ``trains`` is true.

    By megatron-core's rules for buffers (``buffer_elements``), to the byte, with this run's layout, buckets and
    data type. Masters and moments are 4 and 8 bytes per parameter over the data-parallel ranks: their mean over those
    ranks, rounded down, because where a buffer is cut differs from rank to rank.
    """
    elements = parameters = width = 0
    for chunk in wrapped.chunks:
        module = chunk.module
        tied_over_stages = module.shape.tie_embeddings and placement.pipeline_size > 1
        slots = [slot for slot in parameter_slots([module]) if trains(slot.unit)]
        shards = [
            TrainedShard(elements=slot.parameter.numel(), own_bucket=slot.is_vocab and tied_over_stages)
            for slot in slots
        ]
        parameters += sum(shard.elements for shard in shards)
        elements += buffer_elements(shards, data_parallel_size=placement.data_size, bucket_size=chunk.bucket_size)
        width = max([width, *(slot.parameter.element_size() for slot in slots)])
    sent = elements if placement.data_size > 1 else 0
    has_masters = width < GRADIENT_WIDTH
    return RankBytes(
        reduced=GRADIENT_WIDTH * sent,
        gathered=width * sent,
        gradients=GRADIENT_WIDTH * elements,
        masters=GRADIENT_WIDTH * parameters // placement.data_size if has_masters else 0,
        moments=2 * GRADIENT_WIDTH * parameters // placement.data_size,
    )
