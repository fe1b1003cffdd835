"""Options of AdamW and its schedule, and their rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Lt

from hft_megatron.config import derived
from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.run import RunConfig


LARGEST_RATE = 1e30
"""Torch's Adam makes fp32 numbers of its quotients."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: Annotated[float, Ge(0)] = 1e-5
    min_lr: Annotated[float, Ge(0)] = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    lr_decay_iters: Annotated[int, Ge(1)] | None = None
    """Iterations until the learning rate has come down to --min-lr, where it stays; those of the run when unset, or of
    a round under --hft-lr-schedule round. Given, a run can be made longer without another schedule."""
    lr_warmup_iters: Annotated[int, Ge(0)] = 0
    lr_warmup_fraction: Annotated[float, Ge(0), Lt(1)] | None = None
    """Warm-up as a fraction of the iterations of the decay, instead of --lr-warmup-iters."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """Not applied to one-dimensional parameters (norms), as in Megatron."""
    adam_beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    adam_beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    adam_eps: Annotated[float, Gt(0)] = 1e-8
    clip_grad: Annotated[float, Ge(0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


def schedule_fits_the_run(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A rate that can be had, one form of warm-up, shorter than the run, and a learning rate that decays downwards."""
    optimizer, training = config.optimizer, config.training
    if optimizer.lr > LARGEST_RATE:
        raise UserError(f"--lr {optimizer.lr}: must be at most {LARGEST_RATE:g}; 1e-5 is a usual one.")
    fraction = optimizer.lr_warmup_fraction
    if fraction is not None and optimizer.lr_warmup_iters:
        raise UserError(
            f"--lr-warmup-fraction {fraction} and --lr-warmup-iters {optimizer.lr_warmup_iters} are both given; "
            f"keep one of them."
        )
    if training.train_epochs is None:
        warmup_fits(optimizer, derived.train_iters(training))
    if optimizer.min_lr > optimizer.lr:
        raise UserError(f"--min-lr {optimizer.min_lr} is above --lr {optimizer.lr}; use at most {optimizer.lr}.")


def warmup_fits(optimizer: OptimizerConfig, iterations: int) -> None:
    """Raise UserError for a warm-up that takes all iterations; those of --train-epochs are known with the data."""
    warmup, fraction = derived.warmup_iters(optimizer, iterations), optimizer.lr_warmup_fraction
    if iterations and warmup >= iterations:
        given = f"--lr-warmup-iters {warmup}" if fraction is None else f"--lr-warmup-fraction {fraction} ({warmup})"
        raise UserError(
            f"{given} must be below --train-iters {iterations}, or the full learning rate is never reached."
        )
    decay = optimizer.lr_decay_iters
    if decay is not None and warmup >= decay:
        raise UserError(
            f"--lr-warmup-iters {warmup} must be below --lr-decay-iters {decay}, which counts from the start of the "
            f"schedule; give a longer decay or a shorter warm-up."
        )
