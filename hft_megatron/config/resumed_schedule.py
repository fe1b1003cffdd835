"""The schedule that the steps before a checkpoint followed, and the one that a resumed run follows.

A checkpoint notes the values of its command; Megatron's two options choose where those of a resuming command differ.
Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from hft_megatron.config import derived
from hft_megatron.config.schema import OptimizerConfig, RunConfig
from hft_megatron.errors import UserError

Noted = Mapping[str, Any]
"""Options of the schedule and the optimizer by field name, with ``lr_decay_iters`` and ``train_iters`` resolved."""

_OVERRIDE = "--override-opt-param-scheduler"
_USE_CHECKPOINT = "--use-checkpoint-opt-param-scheduler"
_DECAY, _LENGTH, _SPAN = "lr_decay_iters", "train_iters", "hft_lr_schedule"


def schedule_to_note(config: RunConfig, span: int) -> dict[str, Any]:
    """The values that a checkpoint of this run notes; ``span`` is how many iterations one pass of the schedule has."""
    return {
        **asdict(config.optimizer),
        _DECAY: derived.decay_iters(config.optimizer, span),
        _SPAN: config.hft.hft_lr_schedule,
        _LENGTH: derived.train_iters(config.training),
    }


def resumed_schedule(config: RunConfig, noted: Noted, span: int, *, iteration: int) -> tuple[RunConfig, list[str]]:
    """The options that a run which resumes at ``iteration`` goes by, and lines for the log about all that differs.

    ``noted`` is what the checkpoint notes, empty for one of an earlier version. Raises UserError where its values are
    asked for and it has none.
    """
    from_checkpoint = config.checkpoint.use_checkpoint_opt_param_scheduler
    if not noted:
        if from_checkpoint:
            raise UserError(
                f"{_USE_CHECKPOINT}: iteration {iteration} in --load {config.checkpoint.load} was saved by an earlier "
                f"version and notes no schedule; leave it out, and give --lr and the others as that run had them."
            )
        return config, [
            f"iteration {iteration} was saved by an earlier version, which noted no schedule: this command's --lr, "
            f"decay and optimizer options are used and can't be compared"
        ]
    new = schedule_to_note(config, span)
    differing = [name for name in new if name != _LENGTH and name in noted and noted[name] != new[name]]
    if from_checkpoint:
        config = _with_values(config, noted)
    lines = [_choice(config, noted, new, differing, iteration)] if differing else []
    if noted.get(_LENGTH, new[_LENGTH]) != new[_LENGTH]:
        lines.append(_other_length(config, noted, new, span, iteration))
    return config, lines


def _with_values(config: RunConfig, noted: Noted) -> RunConfig:
    kept = {field.name: noted[field.name] for field in fields(OptimizerConfig) if field.name in noted}
    return replace(
        config,
        optimizer=replace(config.optimizer, **kept),
        hft=replace(config.hft, **{_SPAN: noted.get(_SPAN, config.hft.hft_lr_schedule)}),
    )


def _choice(config: RunConfig, noted: Noted, new: Noted, differing: list[str], iteration: int) -> str:
    pairs = ", ".join(f"{_called(name)} {noted[name]} -> {new[name]}" for name in differing)
    listed = f"(checkpoint -> this command): {pairs}"
    if config.checkpoint.use_checkpoint_opt_param_scheduler:
        return f"{_USE_CHECKPOINT}: the values of iteration {iteration} are used where they differ {listed}"
    if config.checkpoint.override_opt_param_scheduler:
        return f"{_OVERRIDE}: this command's values are used where iteration {iteration} has others {listed}"
    return (
        f"warning: the learning-rate schedule or optimizer is not that of iteration {iteration}, and this command's "
        f"values are used {listed}; {_USE_CHECKPOINT} would keep the checkpoint's, {_OVERRIDE} says that this is meant"
    )


def _other_length(config: RunConfig, noted: Noted, new: Noted, span: int, iteration: int) -> str:
    asked = derived.train_iters(config.training)
    line = f"the run has {asked} iterations now, and had {noted[_LENGTH]} when iteration {iteration} was saved"
    end, optimizer = derived.decay_iters(config.optimizer, span), config.optimizer
    if config.hft.hft_lr_schedule == "run" and optimizer.lr_decay_style != "constant" and end < asked:
        line += f"; from iteration {end} on the learning rate is --min-lr {optimizer.min_lr}"
    return line


def _called(name: str) -> str:
    return "length of the decay in iterations" if name == _DECAY else f"--{name.replace('_', '-')}"
