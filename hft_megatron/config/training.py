"""Options of the training itself (length, batch sizes, precision), and their rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from hft_megatron.config import derived
from hft_megatron.config.declared import SAME_RUN, flag
from hft_megatron.config.parallel import nearest_divisor
from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.run import RunConfig


TransformerImpl = Literal["local", "transformer_engine"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length of the training, batch sizes and precision."""

    micro_batch_size: Annotated[int, Ge(1)] = 1
    """Sequences per forward pass on one data-parallel rank. Under --packing a sequence is a pack of examples. In
    preference tuning this and --global-batch-size count pairs, or packs of pairs."""
    global_batch_size: Annotated[int, Ge(1)] | None = None
    """Sequences per optimizer step over all ranks; micro-batch size x data-parallel size when unset."""
    rampup_batch_size: Annotated[tuple[int, ...], SAME_RUN] = ()
    """Batch-size ramp START INCREMENT SAMPLES: the first steps have START sequences, and over the first SAMPLES
    sequences of the run the batch grows by INCREMENT up to --global-batch-size. Needs --train-samples."""
    skip_nonfinite_steps: Annotated[int, Ge(0)] = 0
    """Largest number of steps with an infinite or undefined loss or gradient that the run skips; one more ends the run.
    The samples of a skipped step count as seen; weights, moments and learning rate do not change."""
    iterations_to_skip: tuple[int, ...] = ()
    """Iterations (numbered from 1) that consume their samples without an update, as in Megatron: weights, moments and
    learning rate do not change, and nothing is logged. A resumed run may change the iterations that are still to
    come."""
    train_iters: Annotated[int, Ge(0)] | None = None
    """Optimizer steps; 100 when neither this, --train-epochs nor --train-samples is set. 0 trains nothing."""
    train_epochs: Annotated[int, Ge(1)] | None = None
    """Passes over the training data, instead of --train-iters. The last batch of every epoch is filled up with the
    first samples of the next epoch; so is the last batch of the run."""
    train_samples: Annotated[int, Ge(1)] | None = None
    """Sequences to train on, instead of --train-iters. A last step that would need more sequences is left out. The
    learning rate schedule and its options then count sequences."""
    check_replicas_interval: Annotated[int, Ge(1)] | None = None
    """Iterations between bit-for-bit comparisons of weights that several ranks hold: data-parallel replicas, norms over
    tensor-parallel ranks, and tied embeddings. A difference ends the run and names the ranks."""
    exit_duration_in_mins: Annotated[float, Gt(0)] | None = None
    """Minutes after which the run saves and ends (exit code 3, as after a signal), at the end of an iteration."""
    exit_interval: Annotated[int, Ge(1)] | None = None
    """Iterations after which the run saves and ends in the same way: at the next multiple of this, unless it is the
    last iteration."""
    seq_length: Annotated[int, Ge(1)] | None = None
    """Longest training sequence in tokens; the model's limit when unset."""
    bf16: bool | None = None
    """bf16 weights with fp32 masters, or fp32 (--no-bf16); bf16 on CUDA and on CPUs with AMX or AVX512-BF16 when
    unset."""
    accumulate_allreduce_grads_in_fp32: Annotated[bool, SAME_RUN] = True
    """fp32 sums of the gradients of bf16 weights, over micro-batches and ranks. --no-... sums in bf16: 2 bytes less
    memory and half the reduced bytes per trainable weight, but rounding in every sum."""
    transformer_impl: TransformerImpl = "local"
    """Kernels of attention, norms and Adam. local: torch's, whatever else is installed. transformer_engine:
    transformer-engine's (needs CUDA and bf16), and Apex's Adam where only Apex has one."""
    recompute_activations: bool = False
    """Recompute attention in the backward pass: the same as --recompute-granularity selective."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activations to recompute in the backward pass instead of keeping: whole layers (full), or the core attention
    alone (selective); none when unset."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Layers that full recomputation covers. uniform: all, in units of --recompute-num-layers layers. block: the first
    --recompute-num-layers layers of a model chunk alone."""
    recompute_num_layers: Annotated[int, Ge(1)] | None = None
    """Layers per recomputed unit (uniform), or recomputed layers per model chunk (block)."""
    seed: Annotated[int, Ge(0)] = 1234
    """Seed of random weights and of the order of the data; also of the draws when --hft-seed is unset."""
    deterministic_mode: bool = False
    """Deterministic kernels and a fixed order of reductions: repeated runs are equal bit for bit."""
    empty_unused_memory_level: Literal[0, 1, 2] = 0
    """Return freed memory that torch keeps to the device: 1 before every update, 2 after it as well. Costs time."""
    manual_gc: bool = False
    """Collect Python's garbage on all ranks at the same time, and never automatically: before training, around
    validations and every --manual-gc-interval."""
    manual_gc_interval: Annotated[int, Ge(0)] = 0
    """Iterations between collections under --manual-gc; 0 for none."""
    manual_gc_eval: bool = True
    """Collect garbage before and after every validation under --manual-gc; --no-manual-gc-eval turns it off."""

    def __post_init__(self) -> None:
        if self.recompute_activations and self.recompute_granularity is None:
            object.__setattr__(self, "recompute_granularity", "selective")


def batch_divides_over_the_ranks(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A step is whole micro-batches on every data-parallel rank; interleaving needs a multiple of PP of them."""
    micro_batch, replicas = config.training.micro_batch_size, derived.data_parallel_size(config.parallel, world_size)
    batch, step = derived.global_batch_size(config, world_size), micro_batch * replicas
    _ramp_fits(config, batch)
    if batch % step:
        raise UserError(
            f"--global-batch-size {batch} is not a multiple of --micro-batch-size {micro_batch} x data-parallel size "
            f"{replicas} = {step}; the nearest size that fits is {_nearest_multiple(batch, step)}."
        )
    stages, microbatches = config.parallel.pipeline_model_parallel_size, batch // step
    if config.parallel.num_layers_per_virtual_pipeline_stage is not None and microbatches % stages:
        raise UserError(
            f"--global-batch-size {batch} makes {microbatches} micro-batches per step, but the interleaved schedule "
            f"needs a multiple of --pipeline-model-parallel-size {stages}; the nearest size that fits is "
            f"{_nearest_multiple(batch, step * stages)}."
        )
    if config.parallel.num_layers_per_virtual_pipeline_stage is not None:
        step *= stages
    for name, size in zip(("START", "INCREMENT"), config.training.rampup_batch_size, strict=False):
        if size % step:
            raise UserError(
                f"--rampup-batch-size: {name} {size} is not a multiple of {step}, the fewest sequences of a step "
                f"(--micro-batch-size x data-parallel size, and under the interleaved schedule x "
                f"--pipeline-model-parallel-size); the nearest size that fits is {_nearest_multiple(size, step)}."
            )


def _may_be_saved(config: RunConfig) -> bool:
    """Return whether a checkpoint to resume from may set what the command leaves unset; the rules then run again."""
    return config.checkpoint.load is not None and not config.checkpoint.finetune


def _ramp_fits(config: RunConfig, batch: int) -> None:
    """--rampup-batch-size comes to the full batch within the run."""
    ramp, samples = config.training.rampup_batch_size, config.training.train_samples
    if not ramp:
        return
    given = " ".join(["--rampup-batch-size", *map(str, ramp)])
    if len(ramp) != 3 or min(ramp) < 1:
        raise UserError(
            f"{given}: must be three whole numbers of at least 1: sequences of the first steps, the increment, and the "
            f"sequences of the run over which the batch grows."
        )
    if config.training.global_batch_size is None:
        if _may_be_saved(config):
            return
        raise UserError(f"{given} needs --global-batch-size, its last size; add it.")
    start, increment, ramp_samples = ramp
    if start >= batch or (batch - start) % increment:
        raise UserError(
            f"{given}: --global-batch-size {batch} must be START {start} plus a multiple of INCREMENT {increment}; "
            f"the nearest size that fits is {start + _nearest_multiple(batch - start, increment)}."
        )
    if samples is None:
        raise UserError(f"{given} needs the length of the run in samples; give it as --train-samples.")
    if samples <= ramp_samples:
        raise UserError(
            f"--train-samples {samples} ends before {given} reaches the full batch; give more than {ramp_samples}, or "
            f"a shorter ramp."
        )
    if config.hft.hft_lr_schedule == "round":
        raise UserError(
            f"{given} gives rounds of equal iterations different numbers of samples, but --hft-lr-schedule round has "
            f"one schedule for all rounds; leave one of the two out."
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
    if training.recompute_activations:
        full = {"--recompute-granularity": granularity if granularity == "full" else None} | units
        for option, value in full.items():
            if value is not None:
                raise UserError(
                    f"--recompute-activations recomputes attention only, but {option} {value} whole layers; keep one "
                    f"of them."
                )
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
        raise UserError(f"--recompute-num-layers {count} is more than {held}; give at most {max(layers)}.")


def _nearest_multiple(wanted: int, step: int) -> int:
    return max(round(wanted / step), 1) * step


def sequence_fits_the_model(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Positions beyond the model's limit were never trained."""
    length, limit = derived.sequence_length(config.training, shape), shape.max_position_embeddings
    if length > limit:
        raise UserError(f"--seq-length {length} is beyond the model's {limit} positions; use at most {limit}.")


def iterations_are_numbered_from_1(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Iterations are numbered as in the log, from 1."""
    for iteration in config.training.iterations_to_skip:
        if iteration < 1:
            raise UserError(
                f"--iterations-to-skip {iteration}: iterations are numbered from 1, as in the log; leave it out."
            )


def gradients_have_a_precision(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Beside fp32 weights there are no gradients in bf16."""
    training = config.training
    if training.bf16 is False and not training.accumulate_allreduce_grads_in_fp32:
        raise UserError(
            "--no-accumulate-allreduce-grads-in-fp32 sums gradients in the bf16 of the weights, but with --no-bf16 the "
            "weights are fp32; leave one of the two out."
        )


def length_is_given_once(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """The length is in iterations, epochs or samples, given once, and the schedule is in the same unit."""
    training, optimizer = config.training, config.optimizer
    lengths = {"iters": training.train_iters, "epochs": training.train_epochs, "samples": training.train_samples}
    given = [f"--train-{name} {value}" for name, value in lengths.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} are both given; keep one of them.")
    wanted, other = ("iters", "samples") if training.train_samples is None else ("samples", "iters")
    for part in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        value = getattr(optimizer, f"{part}_{other}")
        if value:
            raise UserError(
                f"{flag(part)}-{other} {value} does not fit a run whose length is "
                f"{given[0] if given else 'in iterations'}; give {flag(part)}-{wanted}"
                f"{'' if wanted == 'samples' else ', or --train-samples as the length'}."
            )
    batch = derived.global_batch_size(config, world_size)
    is_known = training.global_batch_size is not None or not _may_be_saved(config)
    if is_known and training.train_samples is not None and training.train_samples < batch:
        raise UserError(
            f"--train-samples {training.train_samples} is less than one step of --global-batch-size {batch}; give at "
            f"least {batch}."
        )
