"""Options of the training itself: how long, how much at a time, in what precision, and their rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from hft_megatron.config import derived
from hft_megatron.config.parallel import nearest_divisor
from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.run import RunConfig


TransformerImpl = Literal["local", "transformer_engine"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how much at a time, in what precision."""

    micro_batch_size: Annotated[int, Ge(1)] = 1
    """Sequences of one forward pass on one data-parallel rank; under --packing a sequence is a pack of examples. In
    preference tuning pairs, or packs of them, are counted, here and in --global-batch-size."""
    global_batch_size: Annotated[int, Ge(1)] | None = None
    """Sequences of one optimizer step over all ranks; micro-batch size x data-parallel size when unset."""
    skip_nonfinite_steps: Annotated[int, Ge(0)] = 0
    """Steps of the run, at most, whose loss or gradients are infinite or undefined and that are left out; the next one
    ends the run. Their samples count as seen; weights, moments and learning rate stay as if the step had not been."""
    train_iters: Annotated[int, Ge(0)] | None = None
    """Optimizer steps; 100 when neither this nor --train-epochs is set. 0 trains nothing."""
    train_epochs: Annotated[int, Ge(1)] | None = None
    """Passes over the training data, instead of --train-iters. The last batch of an epoch is filled up with the first
    samples of the next, the last one of all too."""
    check_replicas_interval: Annotated[int, Ge(1)] | None = None
    """Iterations between comparisons of the weights that several ranks hold, bit for bit: those of data-parallel
    replicas, norms over tensor-parallel ranks, tied embeddings. Ranks that differ end the run and are named."""
    exit_duration_in_mins: Annotated[float, Gt(0)] | None = None
    """Save and end (exit code 3, as after a signal) at the first iteration this long after the start."""
    seq_length: Annotated[int, Ge(1)] | None = None
    """Longest training sequence in tokens; the model's limit when unset."""
    bf16: bool | None = None
    """bf16 weights with fp32 masters, or fp32 (--no-bf16). Unset: bf16 on CUDA and CPUs with AMX or AVX512-BF16."""
    transformer_impl: TransformerImpl = "local"
    """Whose kernels compute attention, norms and Adam: torch's, whatever else is installed, or those of
    transformer-engine (needs CUDA and bf16), or NVIDIA's Apex for Adam where it alone has one."""
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: Annotated[int, Ge(1)] | None = None
    seed: Annotated[int, Ge(0)] = 1234
    deterministic_mode: bool = False
    """Only deterministic kernels and a fixed order of reductions: repeated runs are equal bit for bit."""


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


def sequence_fits_the_model(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Positions beyond the model's limit were never trained."""
    length, limit = derived.sequence_length(config.training, shape), shape.max_position_embeddings
    if length > limit:
        raise UserError(f"--seq-length {length} is beyond the model's {limit} positions; use at most {limit}.")


def length_is_given_once(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Iterations or epochs: of two lengths one would be ignored."""
    iterations, epochs = config.training.train_iters, config.training.train_epochs
    if iterations is not None and epochs is not None:
        raise UserError(f"--train-iters {iterations} and --train-epochs {epochs} are both given; keep one of them.")
