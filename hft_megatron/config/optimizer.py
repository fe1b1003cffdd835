"""Options of AdamW and its schedule, and their rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from hft_megatron.config import derived
from hft_megatron.config.declared import SAME_RUN
from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.run import RunConfig


LARGEST_RATE = 1e30
"""Largest learning rate: torch's Adam converts its quotients to fp32."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: Annotated[float, Ge(0)] = 1e-5
    """Peak learning rate, reached at the end of the warm-up."""
    min_lr: Annotated[float, Ge(0)] = 0.0
    """Learning rate at the end of the decay."""
    decoupled_lr: Annotated[float, Ge(0)] | None = None
    """Peak learning rate of embedding and head, on the same schedule; --lr when unset."""
    decoupled_min_lr: Annotated[float, Ge(0)] | None = None
    """Learning rate of embedding and head at the end of the decay; --min-lr when unset."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay from --lr to --min-lr after the warm-up. ``inverse-square-root``: --lr x sqrt(warm-up /
    iteration), at least --min-lr. ``WSD``: constant until the last --lr-wsd-decay-iters of the decay."""
    lr_decay_iters: Annotated[int, Ge(1)] | None = None
    """Iterations from the start of the schedule until the learning rate reaches --min-lr, where it stays; those of the
    run when unset, or of a round under --hft-lr-schedule round. With it, a longer run keeps the same schedule."""
    lr_decay_samples: Annotated[int, Ge(1)] | None = None
    """Length of the decay in sequences, like --lr-decay-iters, for a run of --train-samples."""
    lr_wsd_decay_iters: Annotated[int, Ge(1)] | None = None
    """Iterations of the final decay under --lr-decay-style WSD."""
    lr_wsd_decay_samples: Annotated[int, Ge(1)] | None = None
    """Length of the final decay in sequences, like --lr-wsd-decay-iters, for a run of --train-samples."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the final decay, for x from 0 to 1. ``exponential``: 2 x 0.5^x - 1. ``minus_sqrt``: 1 - sqrt(x)."""
    lr_schedule_iters: Annotated[int, Ge(1)] | None = None
    """Iterations of a longer schedule of which this run is a part, as with --continual-schedule continue; the run's own
    iterations when unset."""
    lr_schedule_start: Annotated[int, Ge(0)] = 0
    """Iterations of --lr-schedule-iters before this run."""
    lr_warmup_init: Annotated[float, Ge(0)] = 0.0
    """Learning rate at the start of the warm-up."""
    lr_warmup_iters: Annotated[int, Ge(0)] = 0
    """Iterations of linear warm-up."""
    lr_warmup_samples: Annotated[int, Ge(0)] = 0
    """Length of the warm-up in sequences, like --lr-warmup-iters, for a run of --train-samples."""
    lr_warmup_fraction: Annotated[float, Ge(0), Lt(1)] | None = None
    """Warm-up as a fraction of the decay, instead of --lr-warmup-iters or --lr-warmup-samples."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """Weight decay of AdamW. One-dimensional parameters (norms) have none, as in Megatron."""
    start_weight_decay: Annotated[float, Ge(0)] | None = None
    """Weight decay at the start of the schedule, instead of --weight-decay."""
    end_weight_decay: Annotated[float, Ge(0)] | None = None
    """Weight decay at the end of the run, or of a round under --hft-lr-schedule round."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the change from --start-weight-decay to --end-weight-decay."""
    adam_beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay rate of AdamW's first moments."""
    adam_beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    """Decay rate of AdamW's second moments."""
    adam_eps: Annotated[float, Gt(0)] = 1e-8
    """Term added to the denominator of AdamW's update."""
    mofo_fraction: Annotated[float, Gt(0), Le(1), SAME_RUN] | None = None
    """Fraction of every trainable matrix that AdamW updates in a step (MoFO, arXiv 2407.20999): the entries with the
    largest first moments. All entries decay, and norms are updated in full. All entries are updated when unset."""
    clip_grad: Annotated[float, Ge(0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


def schedule_fits_the_run(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """The rate is possible, the warm-up is given once and shorter than the run, and the learning rate decays."""
    optimizer, training = config.optimizer, config.training
    if optimizer.lr > LARGEST_RATE:
        raise UserError(f"--lr {optimizer.lr}: must be at most {LARGEST_RATE:g}; a usual value is 1e-5.")
    fraction, unit = optimizer.lr_warmup_fraction, derived.schedule_unit(training)
    warmup = getattr(optimizer, f"lr_warmup_{unit}")
    if fraction is not None and warmup:
        raise UserError(
            f"--lr-warmup-fraction {fraction} and --lr-warmup-{unit} {warmup} are both given; keep one of them."
        )
    if training.train_epochs is None:
        warmup_fits(optimizer, derived.schedule_length(config), unit)
    if optimizer.min_lr > optimizer.lr:
        raise UserError(f"--min-lr {optimizer.min_lr} is above --lr {optimizer.lr}; use at most {optimizer.lr}.")
    if optimizer.lr_warmup_init > optimizer.lr:
        raise UserError(
            f"--lr-warmup-init {optimizer.lr_warmup_init} is above --lr {optimizer.lr}, at which the warm-up ends; "
            f"use at most {optimizer.lr}."
        )


def a_part_of_a_schedule_is_within_it(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A schedule over several runs counts iterations, and this run's part lies within it."""
    start, whole = config.optimizer.lr_schedule_start, config.optimizer.lr_schedule_iters
    if whole is None:
        if start > 0:
            raise UserError(
                f"--lr-schedule-start {start} needs --lr-schedule-iters, the length of the whole schedule; add it."
            )
        return
    if config.training.train_samples is not None:
        raise UserError(
            f"--lr-schedule-iters {whole} counts iterations, but with --train-samples the schedule counts samples; "
            f"give the length as --train-iters."
        )
    if config.hft.hft_lr_schedule == "round":
        raise UserError(
            f"--lr-schedule-iters {whole} spans several runs, but --hft-lr-schedule round has one schedule per round; "
            f"leave one of them out."
        )
    length = derived.known_train_iters(config.training)
    if length is not None and start + length > whole:
        raise UserError(
            f"--lr-schedule-start {start} plus --train-iters {length} is more than --lr-schedule-iters {whole}; give "
            f"at least {start + length}."
        )


def decoupled_rates_fit(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """The learning rate of embedding and head decays, and one of the two may train."""
    optimizer, hft = config.optimizer, config.hft
    rate, least = optimizer.decoupled_lr, optimizer.decoupled_min_lr
    if rate is None:
        if least is not None:
            raise UserError(f"--decoupled-min-lr {least} needs --decoupled-lr; add it or leave it out.")
        return
    if rate > LARGEST_RATE:
        raise UserError(f"--decoupled-lr {rate}: must be at most {LARGEST_RATE:g}; a usual value is 1e-5.")
    given = f"--min-lr {optimizer.min_lr}" if least is None else f"--decoupled-min-lr {least}"
    if (optimizer.min_lr if least is None else least) > rate:
        raise UserError(f"{given} is above --decoupled-lr {rate}; give a --decoupled-min-lr of at most {rate}.")
    if hft.hft_freeze_embedding and hft.hft_freeze_head:
        raise UserError(
            f"--decoupled-lr {rate} is the learning rate of embedding and head, but --hft-freeze-embedding and "
            f"--hft-freeze-head freeze both; leave it out."
        )


def decay_style_has_what_it_needs(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """WSD, and only WSD, has a final decay with a length; the inverse square root needs a warm-up."""
    optimizer, unit = config.optimizer, derived.schedule_unit(config.training)
    style, end = optimizer.lr_decay_style, derived.wsd_decay_steps(optimizer)
    if style == "WSD" and end is None:
        raise UserError(f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}, the length of its final decay; add it.")
    given = None if end is None else f"--lr-wsd-decay-{unit} {end}"
    if optimizer.lr_wsd_decay_style != "exponential":
        given = f"--lr-wsd-decay-style {optimizer.lr_wsd_decay_style}"
    if style != "WSD" and given is not None:
        raise UserError(f"{given} needs --lr-decay-style WSD, but it is {style}; leave one of the two out.")
    has_warmup = derived.warmup_steps(optimizer, 1) > 0 or bool(optimizer.lr_warmup_fraction)
    if style == "inverse-square-root" and not has_warmup:
        raise UserError(
            f"--lr-decay-style inverse-square-root is --lr x sqrt(warm-up / iteration), which is not defined without a "
            f"warm-up; give --lr-warmup-{unit}."
        )
    if optimizer.lr_warmup_init > 0 and not has_warmup:
        raise UserError(
            f"--lr-warmup-init {optimizer.lr_warmup_init} is the learning rate at the start of a warm-up, but there is "
            f"no warm-up; give --lr-warmup-{unit}, or leave it out."
        )


def weight_decay_is_given_once(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Weight decay is constant, or rises between two values (Megatron's rule)."""
    optimizer = config.optimizer
    style, start, end = optimizer.weight_decay_incr_style, optimizer.start_weight_decay, optimizer.end_weight_decay
    for option, value in (("--start-weight-decay", start), ("--end-weight-decay", end)):
        if style == "constant" and value is not None:
            raise UserError(
                f"{option} {value} needs --weight-decay-incr-style linear or cosine; add it, or give a constant value "
                f"as --weight-decay."
            )
        if style != "constant" and value is None:
            raise UserError(f"--weight-decay-incr-style {style} needs {option}; add it.")
    if start is not None and end is not None and end < start:
        raise UserError(
            f"--end-weight-decay {end} is below --start-weight-decay {start}, but weight decay can only rise; give at "
            f"least {start}."
        )


def warmup_fits(optimizer: OptimizerConfig, length: int, unit: str = "iters") -> None:
    """Raise UserError for a warm-up as long as the run, or as --lr-schedule-iters.

    ``length`` is the run's in ``unit`` (iters or samples); that of --train-epochs is known once the data is read.
    """
    whole = f"--train-{unit}"
    if optimizer.lr_schedule_iters is not None:
        whole, length = "--lr-schedule-iters", optimizer.lr_schedule_iters
    warmup, fraction = derived.warmup_steps(optimizer, length), optimizer.lr_warmup_fraction
    option = f"--lr-warmup-{unit}"
    if length and warmup >= length:
        given = f"{option} {warmup}" if fraction is None else f"--lr-warmup-fraction {fraction} ({warmup})"
        raise UserError(f"{given} must be below {whole} {length}; otherwise the full learning rate is never reached.")
    decay = derived.decay_steps(optimizer, length)
    if length and warmup >= decay:
        raise UserError(
            f"{option} {warmup} must be below --lr-decay-{unit} {decay}, which counts from the start of the schedule; "
            f"give a longer decay or a shorter warm-up."
        )
    end = derived.wsd_decay_steps(optimizer)
    if length and end is not None and end > decay - warmup:
        raise UserError(
            f"--lr-wsd-decay-{unit} {end} is longer than the decay after the warm-up, {decay - warmup}; give at most "
            f"{decay - warmup}."
        )
