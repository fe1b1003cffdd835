"""Rules about sizes, the schedule and the optimizer's numbers.

Every rule takes (options, shape, world size) and raises UserError with one sentence; ``validation`` runs them.
"""

from typing import Any

from hft_megatron.config import derived
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.schema import OptimizerConfig, RunConfig
from hft_megatron.errors import UserError

_AT_LEAST_ONE = {
    "parallel": (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "num_layers_per_virtual_pipeline_stage",
        "ddp_bucket_size",
    ),
    "model": ("make_vocab_size_divisible_by",),
    "optimizer": ("lr_decay_iters",),
    "training": (
        "micro_batch_size",
        "global_batch_size",
        "check_replicas_interval",
        "train_epochs",
        "seq_length",
        "recompute_num_layers",
    ),
    "data": ("packing_window",),
    "hft": ("hft_audit_interval",),
    "checkpoint": ("save_interval", "keep_last", "save_retain_interval", "save_hf_interval", "save_hf_keep"),
    "logging": ("log_interval", "eval_interval", "eval_iters"),
}
_AT_LEAST_ZERO = {
    "training": ("train_iters", "seed", "skip_nonfinite_steps"),
    "optimizer": ("lr", "min_lr", "lr_warmup_iters", "weight_decay", "clip_grad"),
    "hft": ("hft_seed", "hft_first_round"),
}
_POSITIVE = {
    "parallel": ("distributed_timeout_minutes",),
    "model": ("norm_epsilon", "rotary_base", "init_method_std"),
    "training": ("exit_duration_in_mins",),
    "optimizer": ("adam_eps",),
    "logging": ("loss_spike_threshold",),
}
_INFINITE = float("inf")
_LARGEST_RATE = 1e30
"""Torch's Adam makes fp32 numbers of its quotients."""


def sizes_are_positive(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """No count is zero or negative, and no number is infinite or not a number."""
    for name, value in _given(config, _AT_LEAST_ONE):
        if value < 1:
            raise UserError(f"{_flag(name)} {value}: must be at least 1.")
    for name, value in _given(config, _AT_LEAST_ZERO):
        if not 0 <= value < _INFINITE:
            raise UserError(f"{_flag(name)} {value}: must be a number of at least 0.")
    for name, value in _given(config, _POSITIVE):
        if not 0 < value < _INFINITE:
            raise UserError(f"{_flag(name)} {value}: must be a number above 0.")
    if config.optimizer.lr > _LARGEST_RATE:
        raise UserError(f"--lr {config.optimizer.lr}: must be at most {_LARGEST_RATE:g}; 1e-5 is a usual one.")
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(config.optimizer, name)
        if not 0 <= value < 1:
            raise UserError(f"{_flag(name)} {value}: must be at least 0 and below 1.")


def heads_fit_the_model(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Query heads share key/value heads evenly, channels pair up, and transformers can read the export."""
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    if heads % groups:
        raise UserError(
            f"--num-query-groups {groups} (a model folder's num_key_value_heads) does not divide "
            f"the model's {heads} attention heads."
        )
    if shape.hidden_size % heads:
        raise UserError(f"--num-attention-heads {heads} does not divide the model's hidden size {shape.hidden_size}.")
    if shape.kv_channels % 2:
        raise UserError(
            f"--kv-channels {shape.kv_channels} (a model folder's head_dim) is odd, and rotary embeddings "
            f"rotate pairs of channels; the nearest size that fits is {shape.kv_channels + 1}."
        )


def sequence_fits_the_model(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Positions beyond the model's limit were never trained."""
    length, limit = derived.sequence_length(config.training, shape), shape.max_position_embeddings
    if length > limit:
        raise UserError(f"--seq-length {length} is beyond the model's {limit} positions; use at most {limit}.")


def schedule_fits_the_run(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """One form of warm-up, shorter than the run, and a learning rate that decays downwards."""
    optimizer, training = config.optimizer, config.training
    fraction = optimizer.lr_warmup_fraction
    if fraction is not None and optimizer.lr_warmup_iters:
        raise UserError(
            f"--lr-warmup-fraction {fraction} and --lr-warmup-iters {optimizer.lr_warmup_iters} are both given; "
            f"keep one of them."
        )
    if fraction is not None and not 0 <= fraction < 1:
        raise UserError(f"--lr-warmup-fraction {fraction} must be at least 0 and below 1.")
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


def length_is_given_once(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Iterations or epochs: of two lengths one would be ignored."""
    iterations, epochs = config.training.train_iters, config.training.train_epochs
    if iterations is not None and epochs is not None:
        raise UserError(f"--train-iters {iterations} and --train-epochs {epochs} are both given; keep one of them.")


def _given(config: RunConfig, names_by_group: dict[str, tuple[str, ...]]) -> list[tuple[str, Any]]:
    """(option, value) of the named options that are set."""
    listed = [(group, name) for group, names in names_by_group.items() for name in names]
    values = [(name, getattr(getattr(config, group), name)) for group, name in listed]
    return [(name, value) for name, value in values if value is not None]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
