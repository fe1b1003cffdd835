"""Options of the layout of model and batch over ranks, and the rules that tie it to the model.

Every rule takes (options, shape, world size) and raises UserError with one sentence; ``validation`` runs them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from hft_megatron.config.declared import flag
from hft_megatron.config.derived import layers_per_stage
from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Layout of the model and the batch over ranks."""

    tensor_model_parallel_size: Annotated[int, Ge(1)] = 1
    """Ranks that share every matrix of a layer (tensor parallelism, TP). Must divide attention heads, query groups and
    feed-forward channels."""
    pipeline_model_parallel_size: Annotated[int, Ge(1)] = 1
    """Stages that the layers are divided into (pipeline parallelism, PP). Data-parallel size = ranks / (TP x PP)."""
    decoder_first_pipeline_num_layers: Annotated[int, Ge(1)] | None = None
    """Layers of the first pipeline stage, for uneven stages. Stages without a size of their own share the rest."""
    decoder_last_pipeline_num_layers: Annotated[int, Ge(1)] | None = None
    """Layers of the last pipeline stage, which also holds the head and computes the loss."""
    num_layers_per_virtual_pipeline_stage: Annotated[int, Ge(1)] | None = None
    """Layers of one model chunk under the interleaved pipeline schedule."""
    overlap_p2p_communication: bool = True
    """Overlap communication between pipeline stages with compute, under the interleaved schedule."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence. Without tensor parallelism it is off, and
    the log says so."""
    overlap_grad_reduce: bool = False
    """Reduce-scatter gradients bucket by bucket while the backward pass runs."""
    overlap_param_gather: bool = False
    """All-gather updated parameters while the next forward pass runs (needs --overlap-grad-reduce)."""
    ddp_bucket_size: Annotated[int, Ge(1)] | None = None
    """Parameters per gradient bucket. When unset, a 16th of the trainable parameters on a rank of the first stage, at
    least 1 million per data-parallel rank and at most megatron-core's default."""
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Backend of torch.distributed; nccl with CUDA and gloo without when unset."""
    distributed_timeout_minutes: Annotated[float, Gt(0)] = 10.0
    """Time-out of rendezvous and collectives, in minutes; fractions are allowed. A host that is silent for half of it
    (2 minutes at most) is named and aborts the run."""


FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"


def pipeline_stages_share_the_layers(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Every stage holds a layer or more, and stages without a size of their own are equal (megatron-core's rule)."""
    parallel, layers = config.parallel, shape.num_layers
    stages, given = parallel.pipeline_model_parallel_size, end_words(parallel)
    if stages == 1 and given:
        raise UserError(f"{given} needs --pipeline-model-parallel-size of at least 2; leave it out.")
    if stages > layers:
        raise UserError(
            f"--pipeline-model-parallel-size {stages} is more than the model's {layers} layers, but every stage needs "
            f"one; the largest size that fits is {layers}."
        )
    if holds_all_layers(parallel, layers):
        return
    ends = _given_ends(parallel)
    rest, others = layers - sum(ends.values()), stages - len(ends)
    others_words = "the other stage" if others == 1 else f"the other {others} stages"
    if not ends:
        problem = f"--pipeline-model-parallel-size {stages} does not divide the model's {layers} layers"
    elif not others:
        problem = f"{given} give the two stages {layers - rest} layers, but the model has {layers}"
    elif rest < others:
        problem = f"{given} leaves {max(rest, 0)} of the model's {layers} layers for {others_words}"
    else:
        problem = f"{given} leaves {rest} of the model's {layers} layers, which {others_words} cannot share equally"
    fitting = _nearest_split(parallel, layers) if ends else proposed_split(parallel, layers)
    raise UserError(f"{problem}; {end_words(fitting)} fits ({_split_words(fitting, layers)}).")


def virtual_stages_share_the_layers(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Every stage holds several chunks of equal size under the interleaved schedule."""
    parallel = config.parallel
    stages, chunk = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    if chunk is None:
        return
    option, per_stage = f"--num-layers-per-virtual-pipeline-stage {chunk}", shape.num_layers // stages
    if stages == 1:
        raise UserError(f"{option} needs --pipeline-model-parallel-size of at least 2; leave it out.")
    if uneven := end_words(parallel):
        raise UserError(f"{option} needs stages of equal size, but {uneven} makes them uneven; leave one of them out.")
    if per_stage % chunk:
        raise UserError(
            f"{option} does not divide the {per_stage} layers of a pipeline stage ({shape.num_layers} layers over "
            f"{stages} stages); the nearest number that fits is {nearest_divisor(chunk, per_stage)}."
        )
    if chunk == per_stage:
        raise UserError(
            f"{option} is the whole of a pipeline stage, so there is nothing to interleave; give fewer or leave it out."
        )


def ranks_factor_into_the_layout(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """World size = TP x PP x DP."""
    tensor, pipeline = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    model_ranks = tensor * pipeline
    if world_size % model_ranks:
        nearest = max(world_size // model_ranks, 1) * model_ranks
        raise UserError(
            f"--tensor-model-parallel-size {tensor} x --pipeline-model-parallel-size {pipeline} = {model_ranks} does "
            f"not divide this run's world size {world_size}; start {nearest} ranks or change the sizes."
        )


def tensor_parallel_divides_the_model(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Every tensor-parallel rank holds whole heads, whole query groups and an equal part of the feed-forward."""
    size = config.parallel.tensor_model_parallel_size
    parts = {
        "attention heads": shape.num_attention_heads,
        "query groups": shape.num_query_groups,
        "feed-forward channels": shape.ffn_hidden_size,
    }
    for name, count in parts.items():
        if count % size:
            problem = f"--tensor-model-parallel-size {size} does not divide the model's {count} {name}"
            nearest = f"the nearest size that fits is {nearest_divisor(size, math.gcd(*parts.values()))}"
            if name == "query groups" and size > count:
                raise UserError(
                    f"{problem}: ranks would hold copies of key and value heads; {nearest}, and "
                    f"--pipeline-model-parallel-size spreads the model over more ranks."
                )
            raise UserError(f"{problem}; {nearest}.")


def overlaps_fit_together(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Options of overlap come with the option that they refine."""
    parallel = config.parallel
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        raise UserError("--overlap-param-gather needs --overlap-grad-reduce; add it.")
    if parallel.ddp_bucket_size is not None and not parallel.overlap_grad_reduce:
        raise UserError(
            f"--ddp-bucket-size {parallel.ddp_bucket_size} needs --overlap-grad-reduce: without it there is one "
            f"bucket; add it, or leave --ddp-bucket-size out."
        )


def holds_all_layers(parallel: ParallelConfig, num_layers: int) -> bool:
    """Return whether every stage holds a layer or more, and the stages together hold all layers."""
    held = layers_per_stage(parallel, num_layers)
    return len(held) == parallel.pipeline_model_parallel_size and min(held) > 0 and sum(held) == num_layers


def proposed_split(parallel: ParallelConfig, num_layers: int) -> ParallelConfig:
    """The most even split of the layers over the stages, which are no more than layers.

    The largest stage is as small as can be, then the options are few, then the smallest stage is large; of two ends the
    last one, which also has the head, holds less.
    """
    stages = parallel.pipeline_model_parallel_size
    ends: list[tuple[int | None, int | None]] = [(None, None)]
    for share in range(1, num_layers if stages > 1 else 1):
        one = num_layers - share * (stages - 1)
        two = num_layers - share * (stages - 2)
        ends += [(None, one), (one, None), (two - two // 2, two // 2)]
    splits = [_with_ends(parallel, first, last) for first, last in ends]

    def unevenness(split: ParallelConfig) -> tuple[int, int, int, int]:
        held = layers_per_stage(split, num_layers)
        return max(held), len(_given_ends(split)), -min(held), held[-1]

    return min((split for split in splits if holds_all_layers(split, num_layers)), key=unevenness)


def end_words(parallel: ParallelConfig) -> str:
    """The options that size the first and the last stage, as on the command line; empty without them."""
    return " ".join(f"{flag(name)} {size}" for name, size in _given_ends(parallel).items())


def pipeline_words(parallel: ParallelConfig, num_layers: int) -> str:
    """``PP 2``, and where stages are uneven what they hold: ``PP 2 (3 + 1 layers)``."""
    held = f" ({_split_words(parallel, num_layers)})" if _given_ends(parallel) else ""
    return f"PP {parallel.pipeline_model_parallel_size}{held}"


def nearest_divisor(wanted: int, total: int) -> int:
    """The divisor of ``total`` closest to ``wanted``, the smaller one of two equally close."""
    return min((d for d in range(1, total + 1) if total % d == 0), key=lambda d: (abs(d - wanted), d))


def _nearest_split(parallel: ParallelConfig, num_layers: int) -> ParallelConfig:
    """The split by the same options whose values are closest to the given ones."""
    given = _given_ends(parallel)
    sizes = range(1, num_layers)
    splits = [
        _with_ends(parallel, first, last)
        for first in (sizes if FIRST in given else (None,))
        for last in (sizes if LAST in given else (None,))
    ]

    def distance(split: ParallelConfig) -> int:
        return sum(abs(getattr(split, name) - size) for name, size in given.items())

    return min((split for split in splits if holds_all_layers(split, num_layers)), key=distance)


def _given_ends(parallel: ParallelConfig) -> dict[str, int]:
    """The options that size an end of the pipeline, where they are given."""
    return {name: size for name in (FIRST, LAST) if (size := getattr(parallel, name)) is not None}


def _with_ends(parallel: ParallelConfig, first: int | None, last: int | None) -> ParallelConfig:
    return replace(parallel, decoder_first_pipeline_num_layers=first, decoder_last_pipeline_num_layers=last)


def _split_words(parallel: ParallelConfig, num_layers: int) -> str:
    """``2 + 6 x 4 + 2 layers``: what the stages hold, first to last."""
    counts = [(size, len(list(equal))) for size, equal in groupby(layers_per_stage(parallel, num_layers))]
    return " + ".join(f"{size}" if count == 1 else f"{count} x {size}" for size, count in counts) + " layers"
