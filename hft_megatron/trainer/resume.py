"""The start of a run: a checkpoint's position and state, and options that differ from its own.

A checkpoint records the values of its command; Megatron's two options choose between them and the resuming command's.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from hft_megatron.checkpoint.folders import end_of_chain, identity_of, iteration_of
from hft_megatron.checkpoint.position import TrainState
from hft_megatron.checkpoint.store import check_saved_plan, load_checkpoint, load_moments, load_weights
from hft_megatron.checkpoint.verification import shared_digest, sound_checkpoint
from hft_megatron.config import derived
from hft_megatron.config.declared import flag
from hft_megatron.config.derived import train_iters
from hft_megatron.config.loading import read_resolved
from hft_megatron.config.optimizer import OptimizerConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import RESOLVED_CONFIG_FILE, same_folder
from hft_megatron.conversion.adapter_folder import load_adapter
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.conversion.load import load_weights as load_hf_weights
from hft_megatron.conversion.save import Announce
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan
from hft_megatron.model.build import build_model, initialize_adapters, initialize_weights
from hft_megatron.model.llama import LlamaModel
from hft_megatron.optimizer.rounds import span_of_round
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.parallel.groups import Placement
from hft_megatron.trainer.adapters import fill_masters
from hft_megatron.trainer.inputs import Inputs
from hft_megatron.trainer.saving import Base

Noted = Mapping[str, Any]
"""Options of the schedule, the optimizer and the run's length by field name, with the length of the decay (in samples
under --train-samples) and ``train_iters`` resolved."""

_OVERRIDE = "--override-opt-param-scheduler"
_USE_CHECKPOINT = "--use-checkpoint-opt-param-scheduler"
_ITERATIONS, _SAMPLES, _SPAN = "train_iters", "train_samples", "hft_lr_schedule"
_COUNTED = {"iters": "iterations", "samples": "samples"}


def schedule_to_note(config: RunConfig, span: int) -> dict[str, Any]:
    """The values that a checkpoint of this run records; ``span`` is the number of steps in one pass of the schedule."""
    unit = derived.schedule_unit(config.training)
    return {
        **asdict(config.optimizer),
        f"lr_decay_{unit}": derived.decay_steps(config.optimizer, span),
        _SPAN: config.hft.hft_lr_schedule,
        _ITERATIONS: derived.train_iters(config.training),
        _SAMPLES: config.training.train_samples,
    }


def _length(noted: Noted) -> tuple[int | None, str]:
    """The length of the run and its unit, iterations or samples; None for a checkpoint that records none."""
    samples = noted.get(_SAMPLES)
    return (noted.get(_ITERATIONS), "iters") if samples is None else (samples, "samples")


def resumed_schedule(config: RunConfig, noted: Noted, span: int, *, iteration: int) -> tuple[RunConfig, list[str]]:
    """The options of a run that resumes at ``iteration``, and lines for the log about all differences.

    ``noted`` are the checkpoint's values, empty for one of an earlier version. Raises UserError where its values are
    required and it has none.
    """
    from_checkpoint = config.checkpoint.use_checkpoint_opt_param_scheduler
    if not noted:
        if from_checkpoint:
            raise UserError(
                f"{_USE_CHECKPOINT}: iteration {iteration} in --load {config.checkpoint.load} was saved by an earlier "
                f"version, which recorded no schedule; leave it out, and give --lr and the others as in that run."
            )
        return config, [
            f"iteration {iteration} was saved by an earlier version, which recorded no schedule: this command's --lr, "
            f"decay and optimizer options are used without a comparison"
        ]
    # An option's default is what runs did before it existed.
    noted = {**asdict(OptimizerConfig()), _SAMPLES: None, **noted}
    new = schedule_to_note(config, span)
    lengths = _ITERATIONS, _SAMPLES
    differing = [name for name in new if name not in lengths and name in noted and noted[name] != new[name]]
    (had, counted), (asked, unit) = _length(noted), _length(new)
    if from_checkpoint:
        saved = f"{_USE_CHECKPOINT}: iteration {iteration} in --load {config.checkpoint.load}"
        if counted != unit:
            raise UserError(
                f"{saved} has a schedule in {_COUNTED[counted]}, but this command's is in {_COUNTED[unit]}; "
                f"give the length as --train-{counted}, or leave {_USE_CHECKPOINT} out."
            )
        config = _with_values(config, noted)
        if had not in (None, asked) and _decay_of_weights_spans_the_run(config):
            raise UserError(
                f"{saved} has a weight decay that reaches --end-weight-decay after {had} {_COUNTED[unit]}, but this "
                f"run has {asked}; give --train-{unit} {had}, or leave {_USE_CHECKPOINT} out."
            )
    lines = [_choice(config, noted, new, differing, iteration)] if differing else []
    if had not in (None, asked) or counted != unit:
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
    if iteration >= new[_ITERATIONS]:
        return f"warning: iteration {iteration} is the last, so these options have no effect {listed}"
    if config.checkpoint.use_checkpoint_opt_param_scheduler:
        return f"{_USE_CHECKPOINT}: the values of iteration {iteration} are used where they differ {listed}"
    if config.checkpoint.override_opt_param_scheduler:
        return f"{_OVERRIDE}: this command's values are used where those of iteration {iteration} differ {listed}"
    return (
        f"warning: the learning rate schedule or optimizer differs from iteration {iteration}; this command's values "
        f"are used {listed}; give {_USE_CHECKPOINT} to keep the checkpoint's, or {_OVERRIDE} to confirm"
    )


def _other_length(config: RunConfig, noted: Noted, new: Noted, span: int, iteration: int) -> str:
    (had, counted), (asked, unit) = _length(noted), _length(new)
    assert asked is not None
    before = f"{had}" if counted == unit else f"{had} {_COUNTED[counted]}"
    line = f"the run now has {asked} {_COUNTED[unit]}; it had {before} when iteration {iteration} was saved"
    optimizer = config.optimizer
    end = derived.decay_steps(optimizer, span) - optimizer.lr_schedule_start
    if config.hft.hft_lr_schedule == "run" and optimizer.lr_decay_style != "constant" and end < asked:
        line += f"; warning: from {_COUNTED[unit][:-1]} {end} on the learning rate is --min-lr {optimizer.min_lr}"
        if optimizer.min_lr == 0:
            line += f", so these {_COUNTED[unit]} change nothing"
    if _decay_of_weights_spans_the_run(config):
        line += f"; warning: the weight decay reaches --end-weight-decay after {asked} {_COUNTED[unit]} instead"
    return line


def _decay_of_weights_spans_the_run(config: RunConfig) -> bool:
    optimizer = config.optimizer
    is_the_runs = config.hft.hft_lr_schedule == "run" and optimizer.lr_schedule_iters is None
    return is_the_runs and optimizer.weight_decay_incr_style != "constant"


def _called(name: str) -> str:
    decay = {f"lr_decay_{unit}": f"length of the decay in {words}" for unit, words in _COUNTED.items()}
    return decay.get(name) or flag(name)


def with_sound_checkpoint(inputs: Inputs, placement: Placement, announce: Announce) -> Inputs:
    """The inputs with the newest intact checkpoint; collective. UserError where the newest checkpoint is damaged,
    unless --load-fallback allows an older one, and where --load-hf is not the folder that the checkpoint was based on.
    """
    options = inputs.config.checkpoint
    if inputs.found is None:
        return inputs
    checkpoint = sound_checkpoint(
        inputs.found,
        placement,
        fallback=options.load_fallback,
        put_aside=options.save is not None and same_folder(options.save, options.load),
        announce=announce,
    )
    if checkpoint is not None:
        _check_base(inputs, checkpoint, placement)
    return replace(inputs, checkpoint=checkpoint)


def _check_base(inputs: Inputs, checkpoint: Path, placement: Placement) -> None:
    """Weights that the chain of checkpoints leaves out must be in the --load-hf folder, byte for byte."""
    end = end_of_chain(checkpoint)
    if not end.is_based_on_model:
        return
    where, folder = f"--load {inputs.config.checkpoint.load}", inputs.config.model.load_hf
    needed = f"iteration {iteration_of(checkpoint)} holds only the weights trained in its round (--save-trained-only)"
    if folder is None:
        raise UserError(f"{where}: {needed}; add --load-hf with the model that the run started from.")
    found = _digest_of_model(folder, placement)
    if found != end.base_digest:
        raise UserError(
            f"{where}: {needed}, on top of a model with the digest {str(end.base_digest)[:12]}, but --load-hf {folder} "
            f"has {found[:12]}; give the folder that the run started from, unchanged."
        )


def _digest_of_model(folder: str, placement: Placement) -> str:
    with HuggingFaceWeights(folder) as weights:
        return shared_digest(weights.files(), placement)


def with_schedule(inputs: Inputs, world_size: int, announce: Announce) -> Inputs:
    """The inputs with the schedule and optimizer options of the resumed run; announces where they differ from the
    checkpoint's. UserError where the checkpoint's are required and it records none.
    """
    if not inputs.resumes or train_iters(inputs.config.training) == 0:
        return inputs
    state = inputs.position
    span = _span(inputs, world_size)
    config, lines = resumed_schedule(inputs.config, state.schedule, span, iteration=state.iteration)
    for line in lines:
        announce(f"> {line}")
    return replace(inputs, config=config)


def idle_skips(inputs: Inputs) -> list[str]:
    """A line about iterations of --iterations-to-skip that this run doesn't reach."""
    training, position = inputs.config.training, inputs.position
    here = range(position.iteration + 1, derived.train_iters(training) + 1)
    idle = [one for one in training.iterations_to_skip if one not in {*here, *position.skipped_iterations}]
    if not idle:
        return []
    return [
        f"warning: --iterations-to-skip {' '.join(map(str, idle))} has no effect: this run trains iterations "
        f"{here.start} to {here.stop - 1}"
    ]


def _span(inputs: Inputs, world_size: int) -> int:
    """Steps of one pass of the schedule: the run's, or a round's under --hft-lr-schedule round."""
    rounds = inputs.round_schedule(world_size)
    return span_of_round(inputs.config, rounds, rounds.first_round, cycle=None).length


def check_plan(inputs: Inputs, plan: Plan) -> None:
    """Raise UserError where a resumed run's checkpoint was trained with another plan, and where a run would take over
    moments of another data type."""
    if inputs.resumes:
        assert inputs.checkpoint is not None
        check_saved_plan(inputs.checkpoint, plan, inputs.shape)
    if inputs.carries_moments:
        assert inputs.checkpoint is not None
        if not _is_of_this_precision(inputs, inputs.checkpoint):
            raise UserError(
                f"--hft-moments carry: --load {inputs.checkpoint.parent} was trained in another data type, whose "
                f"moments don't fit; train both in the same one, or start this run with --no-load-optim."
            )


def _is_of_this_precision(inputs: Inputs, checkpoint: Path) -> bool:
    saved = read_resolved(checkpoint.parent / RESOLVED_CONFIG_FILE)
    return saved.training.bf16 == inputs.config.training.bf16


def starting_model(inputs: Inputs, placement: Placement, announce: Announce) -> list[LlamaModel]:
    """This rank's model chunks, with weights from the --load-hf folder, from the run of --finetune, or random;
    collective."""
    config = inputs.config
    chunks = build_model(
        inputs.shape,
        config.parallel,
        config.training,
        placement=placement,
        dtype=torch.bfloat16 if config.training.bf16 else torch.float32,
        vocab_multiple=config.model.make_vocab_size_divisible_by,
    )
    if config.model.load_hf is not None:
        load_hf_weights(config.model.load_hf, chunks, inputs.shape, placement)
    else:
        initialize_weights(chunks, inputs.shape, seed=config.training.seed, placement=placement)
    if inputs.shape.adapters is not None:
        _start_adapters(inputs, chunks, placement, announce)
    if inputs.checkpoint is not None and not inputs.resumes:
        load_weights(inputs.checkpoint, chunks)
        announce(f"  successfully loaded the weights of {inputs.checkpoint}; starting a new run from them")
    return chunks


def _start_adapters(inputs: Inputs, chunks: Sequence[LlamaModel], placement: Placement, announce: Announce) -> None:
    """Initialises the adapters at random, or from --lora-adapter; collective."""
    config, folder = inputs.config, inputs.config.lora.lora_adapter
    adapters = inputs.shape.adapters
    assert adapters is not None
    announce(f"> adapters: {adapters}")
    if adapters.dropout > 0:
        announce("> --lora-dropout depends on the data-parallel and pipeline rank: another layout drops other entries")
    initialize_adapters(chunks, inputs.shape, seed=config.training.seed, placement=placement)
    if folder is not None:
        load_adapter(folder, chunks, placement)
        announce(f"> adapters continue from --lora-adapter {folder}")


def starting_state(inputs: Inputs, placement: Placement, wrapped: WrappedModel, announce: Announce) -> TrainState:
    """State at the beginning, or that of the run's checkpoint, loaded into the model; collective."""
    state = TrainState(
        round=inputs.position.round,
        tensor_model_parallel_size=placement.tensor_size,
        pipeline_model_parallel_size=placement.pipeline_size,
        device=placement.device.type,
        schedule=schedule_to_note(inputs.config, _span(inputs, placement.world_size)),
    )
    folder = inputs.config.lora.lora_adapter
    if folder is not None and not inputs.resumes:
        fill_masters(folder, wrapped, placement)
    if inputs.carries_moments:
        assert inputs.checkpoint is not None
        keeps_frozen = inputs.config.hft.hft_frozen_moments == "host"
        units = load_moments(inputs.checkpoint, wrapped, placement, keeps_frozen=keeps_frozen)
        announce(f"> --hft-moments carry: moments of {units} units continue from {inputs.checkpoint}")
    if not inputs.resumes:
        return state
    assert inputs.checkpoint is not None
    takes_optimizer = inputs.config.checkpoint.load_optim
    loaded = load_checkpoint(inputs.checkpoint, wrapped, placement, optimizer=takes_optimizer)
    announce(f"  successfully loaded checkpoint from {inputs.checkpoint} at iteration {loaded.iteration}")
    if not takes_optimizer:
        announce(
            "> --no-load-optim: moments start at zero and masters from the weights; data and learning rate resume at "
            "the checkpoint's position"
        )
    return replace(
        state,
        iteration=loaded.iteration,
        consumed_samples=loaded.consumed_samples,
        skipped_iterations=loaded.skipped_iterations,
        asked_to_skip=loaded.asked_to_skip,
        round=loaded.round,
    )


def starting_base(inputs: Inputs, placement: Placement) -> Base | None:
    """Base of the first checkpoints under --save-trained-only; collective."""
    options = inputs.config.checkpoint
    if not options.save_trained_only:
        return None
    if not inputs.resumes:
        round, folder = inputs.position.round, inputs.config.model.load_hf
        # Adapters are in every checkpoint, and the frozen weights beside them never change.
        if inputs.checkpoint is not None and inputs.shape.adapters is None:
            return _base_in_run(inputs, inputs.checkpoint, round)
        return None if folder is None else Base(round=round, digest=_digest_of_model(folder, placement))
    assert inputs.checkpoint is not None
    state = TrainState.read(inputs.checkpoint)
    in_save_folder = options.save is not None and same_folder(options.save, options.load)
    if state.base_digest is not None and (in_save_folder or state.base_iteration is None):
        return Base(
            round=state.round, iteration=state.base_iteration, folder=state.base_folder, digest=state.base_digest
        )
    if state.is_whole and in_save_folder:
        return Base(round=state.round, iteration=state.iteration, digest=identity_of(inputs.checkpoint))
    return None


def _base_in_run(inputs: Inputs, checkpoint: Path, round: int) -> Base | None:
    """The checkpoint of another run whose weights --finetune took; None where that run has another precision, in which
    a frozen weight has other bits."""
    save = inputs.config.checkpoint.save
    assert save is not None, "the rules of the options require it"
    if not _is_of_this_precision(inputs, checkpoint):
        return None
    folder = os.path.relpath(checkpoint.parent.resolve(), Path(save).resolve())
    return Base(round=round, iteration=iteration_of(checkpoint), folder=folder, digest=identity_of(checkpoint))
