"""Rules that tie the parallel layout to the model's shape, the batch and the number of ranks.

Every rule takes (options, shape, world size) and raises UserError with one sentence; ``validation`` runs them.
"""

import math

from hft_megatron.config import derived
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.pipeline_rules import nearest_divisor
from hft_megatron.config.schema import RunConfig
from hft_megatron.errors import UserError


def only_what_is_built(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Options that Megatron has and this project does not have yet are refused, not ignored."""
    parallel = config.parallel
    asked = {
        f"--context-parallel-size {parallel.context_parallel_size}": parallel.context_parallel_size != 1,
        f"--expert-model-parallel-size {parallel.expert_model_parallel_size}": parallel.expert_model_parallel_size != 1,
        "--use-megatron-fsdp": parallel.use_megatron_fsdp,
        f"--fp8-format {config.training.fp8_format}": config.training.fp8_format is not None,
    }
    for option, is_asked in asked.items():
        if is_asked:
            raise UserError(f"{option} is not built yet: leave it out.")


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
            fault = f"--tensor-model-parallel-size {size} does not divide the model's {count} {name}"
            nearest = f"the nearest size that fits is {nearest_divisor(size, math.gcd(*parts.values()))}"
            if name == "query groups" and size > count:
                raise UserError(
                    f"{fault}: ranks would hold copies of key and value heads; {nearest}, and "
                    f"--pipeline-model-parallel-size spreads the model over more ranks."
                )
            raise UserError(f"{fault}; {nearest}.")


def batch_divides_over_the_ranks(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A step is whole micro-batches on every data-parallel rank; interleaving needs a multiple of PP of them."""
    micro_batch, replicas = config.training.micro_batch_size, derived.data_parallel_size(config.parallel, world_size)
    batch, step = derived.global_batch_size(config, world_size), micro_batch * replicas
    if batch % step:
        raise UserError(
            f"--global-batch-size {batch} is not a multiple of --micro-batch-size {micro_batch} x data-parallel size "
            f"{replicas} = {step}; the nearest size that fits is {_nearest_multiple(batch, step)}."
        )
    stages, microbatches = config.parallel.pipeline_model_parallel_size, batch // step
    if config.parallel.num_layers_per_virtual_pipeline_stage is not None and microbatches % stages:
        raise UserError(
            f"--global-batch-size {batch} makes {microbatches} micro-batches per step, and the interleaved schedule "
            f"needs a multiple of --pipeline-model-parallel-size {stages}; the nearest size that fits is "
            f"{_nearest_multiple(batch, step * stages)}."
        )


def overlaps_fit_together(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """What needs another option to mean anything."""
    parallel = config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise UserError("--sequence-parallel needs --tensor-model-parallel-size of at least 2; leave it out.")
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        raise UserError("--overlap-param-gather needs --overlap-grad-reduce; add it.")
    if parallel.ddp_bucket_size is not None and not parallel.overlap_grad_reduce:
        raise UserError(
            f"--ddp-bucket-size {parallel.ddp_bucket_size} needs --overlap-grad-reduce: without it there is one bucket."
        )


def recompute_options_fit_together(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """``full`` recomputes layers in units, ``selective`` recomputes only the core attention."""
    training = config.training
    granularity, method, count = (
        training.recompute_granularity,
        training.recompute_method,
        training.recompute_num_layers,
    )
    units = {"--recompute-method": method, "--recompute-num-layers": count}
    for option, value in units.items():
        if granularity == "full" and value is None:
            raise UserError(f"--recompute-granularity full needs {option}; add it.")
        if granularity != "full" and value is not None:
            raise UserError(f"{option} {value} needs --recompute-granularity full; add it or leave {option} out.")
    if count is None:
        return
    layers = sorted({len(chunk) for chunk in derived.layers_of_chunks(config.parallel, shape.num_layers)}, reverse=True)
    held = f"the {' and '.join(map(str, layers))} layers of a pipeline stage"
    # megatron-core walks a chunk in strides of this many layers, and runs past its end when they do not divide it.
    if method == "uniform" and math.gcd(*layers) % count:
        raise UserError(
            f"--recompute-num-layers {count} does not divide {held}; "
            f"the nearest number that fits is {nearest_divisor(count, math.gcd(*layers))}."
        )
    if count > max(layers):
        raise UserError(f"--recompute-num-layers {count} is more than {held}.")


def _nearest_multiple(wanted: int, step: int) -> int:
    return max(round(wanted / step), 1) * step
