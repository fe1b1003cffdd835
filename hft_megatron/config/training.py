"""Options of the training itself: how long, how much at a time, in what precision, and their rules."""

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
    """How long, how much at a time, in what precision."""

    micro_batch_size: Annotated[int, Ge(1)] = 1
    """Sequences of one forward pass on one data-parallel rank; under --packing a sequence is a pack of examples. In
    preference tuning pairs, or packs of them, are counted, here and in --global-batch-size."""
    global_batch_size: Annotated[int, Ge(1)] | None = None
    """Sequences of one optimizer step over all ranks; micro-batch size x data-parallel size when unset."""
    rampup_batch_size: Annotated[tuple[int, ...], SAME_RUN] = ()
    """START INCREMENT SAMPLES: the first steps have START sequences, and over the first SAMPLES sequences of the run
    steps grow by INCREMENT up to --global-batch-size. Needs --train-samples."""
    skip_nonfinite_steps: Annotated[int, Ge(0)] = 0
    """Steps of the run, at most, whose loss or gradients are infinite or undefined and that are left out; the next one
    ends the run. Their samples count as seen; weights, moments and learning rate stay as if the step had not been."""
    iterations_to_skip: tuple[int, ...] = ()
    """Numbers (from 1) of iterations that take their samples and do nothing with them: weights, moments and learning
    rate stay as if they had not been, as Megatron has it, and nothing is logged of them. A resumed run may name others
    among those that are to come."""
    train_iters: Annotated[int, Ge(0)] | None = None
    """Optimizer steps; 100 when neither this nor --train-epochs is set. 0 trains nothing."""
    train_epochs: Annotated[int, Ge(1)] | None = None
    """Passes over the training data, instead of --train-iters. The last batch of an epoch is filled up with the first
    samples of the next, the last one of all too."""
    train_samples: Annotated[int, Ge(1)] | None = None
    """Sequences to train on, instead of --train-iters; a last step that would take more is left out. The schedule of
    the learning rate then counts sequences, and so do the options of its parts."""
    check_replicas_interval: Annotated[int, Ge(1)] | None = None
    """Iterations between comparisons of the weights that several ranks hold, bit for bit: those of data-parallel
    replicas, norms over tensor-parallel ranks, tied embeddings. Ranks that differ end the run and are named."""
    exit_duration_in_mins: Annotated[float, Gt(0)] | None = None
    """Save and end (exit code 3, as after a signal) at the first iteration this long after the start."""
    exit_interval: Annotated[int, Ge(1)] | None = None
    """Save and end, in the same way, after the next iteration that is a multiple of this and not the last."""
    seq_length: Annotated[int, Ge(1)] | None = None
    """Longest training sequence in tokens; the model's limit when unset."""
    bf16: bool | None = None
    """bf16 weights with fp32 masters, or fp32 (--no-bf16). Unset: bf16 on CUDA and CPUs with AMX or AVX512-BF16."""
    accumulate_allreduce_grads_in_fp32: Annotated[bool, SAME_RUN] = True
    """Gradients beside bf16 weights are added up, over micro-batches and ranks, in fp32; --no-... adds them in bf16:
    2 bytes less of memory and half of what is reduced for each weight that trains, and rounding in every sum."""
    transformer_impl: TransformerImpl = "local"
    """Whose kernels compute attention, norms and Adam: torch's, whatever else is installed, or those of
    transformer-engine (needs CUDA and bf16), or NVIDIA's Apex for Adam where it alone has one."""
    recompute_activations: bool = False
    """The same as --recompute-granularity selective."""
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: Annotated[int, Ge(1)] | None = None
    seed: Annotated[int, Ge(0)] = 1234
    deterministic_mode: bool = False
    """Only deterministic kernels and a fixed order of reductions: repeated runs are equal bit for bit."""
    empty_unused_memory_level: Literal[0, 1, 2] = 0
    """Give the device back what torch keeps of freed memory: 1 before every update, 2 after it as well; costs time."""
    manual_gc: bool = False
    """Collect Python's garbage on all ranks at once, and at no other time: before training, around validations and
    every --manual-gc-interval."""
    manual_gc_interval: Annotated[int, Ge(0)] = 0
    """With --manual-gc: iterations between collections; 0 for none."""
    manual_gc_eval: bool = True
    """With --manual-gc: collect before and after every validation (--no-manual-gc-eval for not)."""

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
            f"--global-batch-size {batch} makes {microbatches} micro-batches per step, and the interleaved schedule "
            f"needs a multiple of --pipeline-model-parallel-size {stages}; the nearest size that fits is "
            f"{_nearest_multiple(batch, step * stages)}."
        )
    if config.parallel.num_layers_per_virtual_pipeline_stage is not None:
        step *= stages
    for name, size in zip(("START", "INCREMENT"), config.training.rampup_batch_size, strict=False):
        if size % step:
            raise UserError(
                f"--rampup-batch-size: {name} {size} is not a multiple of the {step} sequences that the ranks take at "
                f"least in a step (--micro-batch-size x data-parallel size, and under the interleaved schedule x "
                f"--pipeline-model-parallel-size); the nearest size that fits is {_nearest_multiple(size, step)}."
            )


def _may_be_saved(config: RunConfig) -> bool:
    """Whether what the command leaves open may be known with the checkpoint that it goes on from: rules are asked again
    then."""
    return config.checkpoint.load is not None and not config.checkpoint.finetune


def _ramp_fits(config: RunConfig, batch: int) -> None:
    """--rampup-batch-size comes to the full batch within the run."""
    ramp, samples = config.training.rampup_batch_size, config.training.train_samples
    if not ramp:
        return
    given = " ".join(["--rampup-batch-size", *map(str, ramp)])
    if len(ramp) != 3 or min(ramp) < 1:
        raise UserError(
            f"{given}: must be three whole numbers of at least 1: the sequences of the first steps, by how many they "
            f"grow, and over how many sequences of the run."
        )
    if config.training.global_batch_size is None:
        if _may_be_saved(config):
            return
        raise UserError(f"{given} leads up to --global-batch-size; add it.")
    start, increment, ramp_samples = ramp
    if start >= batch or (batch - start) % increment:
        raise UserError(
            f"{given}: --global-batch-size {batch} must be START {start} and one or more times INCREMENT {increment}; "
            f"the nearest size that fits is {start + _nearest_multiple(batch - start, increment)}."
        )
    if samples is None:
        raise UserError(f"{given} needs the length of the run as --train-samples; give it instead of others.")
    if samples <= ramp_samples:
        raise UserError(
            f"--train-samples {samples} ends before the full batch that {given} leads to; give more than "
            f"{ramp_samples}, or a shorter ramp."
        )
    if config.hft.hft_lr_schedule == "round":
        raise UserError(
            f"{given} makes rounds of as many iterations differ in their samples, and --hft-lr-schedule round has one "
            f"schedule for all of them; leave one of the two out."
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
                    f"--recompute-activations recomputes attention alone, and {option} {value} whole layers; keep one "
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
        raise UserError(f"--recompute-num-layers {count} is more than {held}.")


def _nearest_multiple(wanted: int, step: int) -> int:
    return max(round(wanted / step), 1) * step


def sequence_fits_the_model(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Positions beyond the model's limit were never trained."""
    length, limit = derived.sequence_length(config.training, shape), shape.max_position_embeddings
    if length > limit:
        raise UserError(f"--seq-length {length} is beyond the model's {limit} positions; use at most {limit}.")


def iterations_are_numbered_from_1(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """The log's numbers: there is no iteration 0."""
    for iteration in config.training.iterations_to_skip:
        if iteration < 1:
            raise UserError(
                f"--iterations-to-skip {iteration}: iterations are numbered from 1, as the log has them; leave it out."
            )


def gradients_have_a_precision(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Beside fp32 weights there are no gradients in bf16."""
    training = config.training
    if training.bf16 is False and not training.accumulate_allreduce_grads_in_fp32:
        raise UserError(
            "--no-accumulate-allreduce-grads-in-fp32 adds up gradients in the bf16 of the weights, and --no-bf16 has "
            "fp32 weights; leave one of the two out."
        )


def length_is_given_once(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Iterations, epochs or samples: of two lengths one would be ignored. The schedule counts what the length does."""
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
                f"{flag(part)}-{other} {value} is not of a run whose length is {given[0] if given else 'in iterations'}"
                f"; give {flag(part)}-{wanted}{'' if wanted == 'samples' else ', or --train-samples as the length'}."
            )
    batch = derived.global_batch_size(config, world_size)
    is_known = training.global_batch_size is not None or not _may_be_saved(config)
    if is_known and training.train_samples is not None and training.train_samples < batch:
        raise UserError(
            f"--train-samples {training.train_samples} is less than one step of --global-batch-size {batch}; give at "
            f"least {batch}."
        )
