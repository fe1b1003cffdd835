"""Where a run starts from: the beginning, the weights of another run, or a checkpoint of its own."""

from collections.abc import Sequence
from dataclasses import replace

from hft_megatron.checkpoint.digests import identity_of
from hft_megatron.checkpoint.position import TrainState
from hft_megatron.checkpoint.store import load_checkpoint, load_weights
from hft_megatron.checkpoint.verification import shared_digest, sound_checkpoint
from hft_megatron.config.derived import train_iters
from hft_megatron.config.resumed_schedule import resumed_schedule, schedule_to_note
from hft_megatron.config.run_folder import same_folder
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.conversion.save import Announce
from hft_megatron.errors import UserError
from hft_megatron.model.llama import LlamaModel
from hft_megatron.optimizer.schedule import span_of_round
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.parallel.groups import Placement
from hft_megatron.training.inputs import Inputs
from hft_megatron.training.saving import Base


def with_sound_checkpoint(inputs: Inputs, placement: Placement, announce: Announce) -> Inputs:
    """The inputs with the newest checkpoint that is what was saved; collective. UserError where the newest is not,
    unless --load-fallback allows an older one, and where the --load-hf folder is not what the checkpoint was based on.
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
        _check_base(inputs, TrainState.read(checkpoint), placement)
    return replace(inputs, checkpoint=checkpoint)


def _check_base(inputs: Inputs, state: TrainState, placement: Placement) -> None:
    """What the checkpoint leaves out must be in the --load-hf folder, byte for byte."""
    if state.is_whole or state.base_iteration is not None:
        return
    where, folder = f"--load {inputs.config.checkpoint.load}", inputs.config.model.load_hf
    needed = f"iteration {state.iteration} holds only what its round trained (--save-trained-only)"
    if folder is None:
        raise UserError(f"{where}: {needed}; add --load-hf with the model that it was trained from.")
    found = _digest_of_model(folder, placement)
    if found != state.base_digest:
        raise UserError(
            f"{where}: {needed}, on a model with the digest {str(state.base_digest)[:12]}, and --load-hf {folder} has "
            f"{found[:12]}; give the folder that it was trained from, unchanged."
        )


def _digest_of_model(folder: str, placement: Placement) -> str:
    with HuggingFaceWeights(folder) as weights:
        return shared_digest(weights.files(), placement)


def with_schedule(inputs: Inputs, world_size: int, announce: Announce) -> Inputs:
    """The inputs with the schedule and optimizer options that the run goes on with, where those differ from the
    checkpoint's, and lines about all that does. UserError where the checkpoint's are asked for and it notes none.
    """
    if not inputs.resumes or train_iters(inputs.config.training) == 0:
        return inputs
    state = inputs.position
    span = _span(inputs, world_size)
    config, lines = resumed_schedule(inputs.config, state.schedule, span, iteration=state.iteration)
    for line in lines:
        announce(f"> {line}")
    return replace(inputs, config=config)


def _span(inputs: Inputs, world_size: int) -> int:
    """Iterations of one pass of the schedule: the run's, or a round's under --hft-lr-schedule round."""
    rounds = inputs.round_schedule(world_size)
    return span_of_round(inputs.config.hft, rounds, rounds.first_round, cycle=None).length


def fill_from_other_run(inputs: Inputs, chunks: Sequence[LlamaModel], announce: Announce) -> None:
    """With --finetune, fills the model with the weights of the --load checkpoint; collective."""
    if inputs.checkpoint is not None and not inputs.resumes:
        load_weights(inputs.checkpoint, chunks)
        announce(f"  successfully loaded the weights of {inputs.checkpoint}: a new run starts from them")


def starting_state(inputs: Inputs, placement: Placement, wrapped: WrappedModel, announce: Announce) -> TrainState:
    """The beginning, or what the run's checkpoint holds, loaded into the model; collective."""
    state = TrainState(
        round=inputs.position.round,
        tensor_model_parallel_size=placement.tensor_size,
        pipeline_model_parallel_size=placement.pipeline_size,
        device=placement.device.type,
        schedule=schedule_to_note(inputs.config, _span(inputs, placement.world_size)),
    )
    if not inputs.resumes:
        return state
    assert inputs.checkpoint is not None
    loaded = load_checkpoint(inputs.checkpoint, wrapped, placement)
    announce(f"  successfully loaded checkpoint from {inputs.checkpoint} at iteration {loaded.iteration}")
    return replace(
        state,
        iteration=loaded.iteration,
        consumed_samples=loaded.consumed_samples,
        skipped_iterations=loaded.skipped_iterations,
        round=loaded.round,
    )


def starting_base(inputs: Inputs, placement: Placement) -> Base | None:
    """What the first checkpoints under --save-trained-only may be based on; collective."""
    options = inputs.config.checkpoint
    if not options.save_trained_only:
        return None
    if not inputs.resumes:
        folder = inputs.config.model.load_hf
        if folder is None or inputs.checkpoint is not None:
            return None
        return Base(round=inputs.position.round, iteration=None, digest=_digest_of_model(folder, placement))
    assert inputs.checkpoint is not None
    state = TrainState.read(inputs.checkpoint)
    in_save_folder = options.save is not None and same_folder(options.save, options.load)
    if state.base_digest is not None and (in_save_folder or state.base_iteration is None):
        return Base(round=state.round, iteration=state.base_iteration, digest=state.base_digest)
    if state.is_whole and in_save_folder:
        return Base(round=state.round, iteration=state.iteration, digest=identity_of(inputs.checkpoint))
    return None
