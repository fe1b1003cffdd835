"""Assembles a run in the order of a job: inputs, ranks, model, plan, optimizer, checkpoint, loop, export."""

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from hft_megatron.checkpoint.position import TrainState
from hft_megatron.checkpoint.store import check_saved_plan
from hft_megatron.config.derived import global_batch_size, train_iters
from hft_megatron.config.loading import write_resolved
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.parallel import pipeline_words
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import RESOLVED_CONFIG_FILE, RUN_IDENTITY_FILE, SPECTRUM_FILE, write_atomically
from hft_megatron.config.run_identity import RunIdentity
from hft_megatron.conversion.load import load_weights
from hft_megatron.conversion.save import Announce
from hft_megatron.data.batches import BatchShare, PrefetchedSteps
from hft_megatron.engine import cpu_backend
from hft_megatron.errors import Stopped, UserError
from hft_megatron.hft.on_ranks import check_agreement
from hft_megatron.hft.plan import Plan
from hft_megatron.model.build import build_model, initialize_weights
from hft_megatron.model.llama import LlamaModel, check_implementation
from hft_megatron.optimizer.wrapping import WrappedModel, adam_in_use, wrap
from hft_megatron.parallel.groups import Placement, make_deterministic, start_groups, stop_groups
from hft_megatron.parallel.peers import Peers, peers
from hft_megatron.parallel.watchdog import OnLoss
from hft_megatron.tracking.tracker import CompositeTracker, Tracker
from hft_megatron.tracking.trackers import build_tracker
from hft_megatron.trainer.hooks import build_hooks
from hft_megatron.trainer.inputs import Inputs, check_inputs_agree, read_inputs, scores_of_run
from hft_megatron.trainer.loop import Hook, learning_rate, train
from hft_megatron.trainer.method import Method
from hft_megatron.trainer.nonfinite import check_weights
from hft_megatron.trainer.out_of_memory import memory_errors_in_words
from hft_megatron.trainer.resume import (
    fill_from_other_run,
    starting_base,
    starting_state,
    with_schedule,
    with_sound_checkpoint,
)
from hft_megatron.trainer.rounds import Rounds
from hft_megatron.trainer.run import Reference, Run
from hft_megatron.trainer.saving import Exporter, Signals, exports_of


def run_training(
    method: Method,
    options: RunConfig,
    shape: ModelShape | None,
    world_size: int,
    *,
    on_loss: OnLoss,
    hooks: Sequence[Hook] = (),
    signals: Signals | None = None,
) -> None:
    """Trains (or, with --train-iters 0, converts) and exports; every rank calls it under torchrun's environment.

    Raises UserError for a user's mistake before a model is built, PeersLost where the ranks do not meet, Stopped after
    a signal or a time limit and the checkpoint. A host that is lost later is named to ``on_loss``, on another
    thread, and the process ends. ``hooks`` are a user's own. ``signals`` listen while it trains and exports, and
    after a failure until the caller closes them, which a process that then ends need not do.
    """
    with peers(options.parallel.distributed_timeout_minutes, on_loss) as company:
        train_and_export(method, options, shape, world_size, company, hooks=hooks, signals=signals)
        company.leave()
        # After a failure peers may be waiting in a collective, and waiting for them here would hide the error.
        stop_groups()


def train_and_export(
    method: Method,
    options: RunConfig,
    shape: ModelShape | None,
    world_size: int,
    company: Peers,
    *,
    hooks: Sequence[Hook] = (),
    signals: Signals | None = None,
    of_a_stage: bool = False,
) -> int:
    """``run_training``, with the process groups left as they are, for a stage that follows; returns the last round.

    ``of_a_stage``, it ends with a line instead of its whole bill.
    """
    inputs = read_inputs(method, options, shape, world_size)
    if inputs.config.training.deterministic_mode:
        make_deterministic()
    company.join(inputs.config.parallel)
    config = _with_dtype(inputs.config)
    check_implementation(config.training.transformer_impl, bf16=config.training.bf16 is True)
    placement = start_groups(config.parallel, inputs.shape.num_layers, config.training.seed)
    announce = _announcer(placement)
    _announce_start(config, inputs, placement, company, announce)
    check_inputs_agree(inputs, placement)
    inputs = with_sound_checkpoint(inputs, placement, announce)
    inputs = with_schedule(inputs, world_size, announce)
    config = replace(config, optimizer=inputs.config.optimizer, hft=inputs.config.hft)
    scores = scores_of_run(inputs, placement)
    rounds = inputs.rounds(world_size, scores)
    plan = _agreed_plan(config, inputs, rounds.plan(inputs.position.round), placement, announce)
    trains = train_iters(config.training) > 0
    tracker = _tracker_on_last_rank(config, inputs, placement) if trains else None
    bf16 = config.training.bf16 is True
    with memory_errors_in_words(
        inputs, placement, bf16=bf16, plan=lambda: plan, when=lambda: "while loading or exporting"
    ):
        try:
            return _from_weights_to_export(
                config,
                inputs,
                placement,
                plan,
                rounds,
                scores,
                tracker,
                announce,
                hooks,
                signals or Signals(),
                of_a_stage,
            )
        except Stopped:
            company.leave()
            stop_groups()
            raise


def _from_weights_to_export(
    config: RunConfig,
    inputs: Inputs,
    placement: Placement,
    plan: Plan,
    rounds: Rounds,
    scores: dict[str, float] | None,
    tracker: Tracker | None,
    announce: Announce,
    hooks: Sequence[Hook],
    signals: Signals,
    of_a_stage: bool,
) -> int:
    """Builds the model, trains where there is a tracker, and exports; returns the last round."""
    chunks = _model_with_weights(config, inputs, placement)
    fill_from_other_run(inputs, chunks, announce)
    share = _share(config, placement)
    reference = None
    if tracker is not None and inputs.method.reference is not None:
        reference = inputs.method.reference(inputs, chunks, rounds, share, placement, announce)
    exporter = Exporter(config.checkpoint, inputs, placement, announce)
    if tracker is None and not inputs.resumes:
        exporter.export_at_end(chunks, frozenset(), 0)
        return inputs.position.round
    wrapped = wrap(
        chunks,
        plan,
        config.parallel,
        config.optimizer,
        bf16=config.training.bf16 is True,
        steps_per_unit=config.hft.hft_moments == "carry",
    )
    state = starting_state(inputs, placement, wrapped, announce)
    if tracker is not None:
        _write_run_files(config, inputs, placement, scores, announce)
        signals.listen()
        hooks_of = partial(build_hooks, own=hooks, exporter=exporter, signals=signals, of_a_stage=of_a_stage)
        wrapped, state = _train(
            config, inputs, placement, wrapped, rounds, share, reference, tracker, state, announce, hooks_of
        )
    with wrapped.gathered_parameters():
        exporter.export_at_end(chunks, rounds.trained_until(state.round), state.iteration)
    signals.close()  # not before, so that what is trained is exported, and not after a failure
    return state.round


def _with_dtype(config: RunConfig) -> RunConfig:
    """Settles bf16 where nothing said otherwise: only if every rank's processor is fast at it."""
    if config.training.bf16 is not None:
        return config
    fast = cpu_backend.has_fast_bf16()
    answers: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(answers, fast)
    return replace(config, training=replace(config.training, bf16=all(answers)))


def _announcer(placement: Placement) -> Announce:
    def announce(line: str) -> None:
        if placement.rank == 0:
            print(line, flush=True)

    return announce


def _announce_start(
    config: RunConfig, inputs: Inputs, placement: Placement, company: Peers, announce: Announce
) -> None:
    for line in inputs.describe():
        announce(f"> {line}")
    kernels = config.training.transformer_impl
    engine = "torch" if kernels == "local" else "transformer-engine"
    adam = adam_in_use(kernels, steps_per_unit=config.hft.hft_moments == "carry")
    announce(
        f"> TP {placement.tensor_size} x {pipeline_words(config.parallel, inputs.shape.num_layers)} x "
        f"DP {placement.data_size} on "
        f"{placement.device.type}, {'bf16 with fp32 masters' if config.training.bf16 else 'fp32'}, "
        f"attention and norms by {engine}, Adam by {adam}"
    )
    if len(company.hosts) > 1:
        announce(f"> {len(company.hosts)} hosts: {', '.join(str(host) for host in company.hosts)}")


def _agreed_plan(config: RunConfig, inputs: Inputs, plan: Plan, placement: Placement, announce: Announce) -> Plan:
    """The plan to start with, the same on every rank and as the checkpoint has it, and its account in the log."""
    if inputs.resumes:
        assert inputs.checkpoint is not None
        check_saved_plan(inputs.checkpoint, plan, inputs.shape)
    check_agreement(plan, coordinates=placement.coordinates)
    if train_iters(config.training) > 0:
        announce(plan.describe())
    return plan


def _model_with_weights(config: RunConfig, inputs: Inputs, placement: Placement) -> list[LlamaModel]:
    chunks = build_model(
        inputs.shape,
        config.parallel,
        config.training,
        placement=placement,
        dtype=torch.bfloat16 if config.training.bf16 else torch.float32,
        vocab_multiple=config.model.make_vocab_size_divisible_by,
    )
    if config.model.load_hf is not None:
        load_weights(config.model.load_hf, chunks, inputs.shape, placement)
    else:
        initialize_weights(chunks, inputs.shape, seed=config.training.seed, placement=placement)
    return chunks


def _tracker_on_last_rank(config: RunConfig, inputs: Inputs, placement: Placement) -> Tracker:
    """The run's tracker, before a model is built; what one rank is refused (a dashboard, a file) all ranks raise."""
    tracker: Tracker = CompositeTracker()
    mistake = None
    try:
        tracker = build_tracker(
            config.logging,
            save=config.checkpoint.save,
            train_iters=train_iters(config.training),
            start_iteration=inputs.position.iteration,
            resolved_config=asdict(config),
            is_writer=placement.is_last_rank,
        )
    except UserError as error:
        mistake = str(error)
    _raise_on_all(mistake, placement)
    return tracker


def _raise_on_all(mistake: str | None, placement: Placement) -> None:
    mistakes: list[str | None] = [None] * placement.world_size
    dist.all_gather_object(mistakes, mistake)
    for found in mistakes:
        if found is not None:
            raise UserError(found)


def _train(
    config: RunConfig,
    inputs: Inputs,
    placement: Placement,
    wrapped: WrappedModel,
    rounds: Rounds,
    share: BatchShare,
    reference: Reference | None,
    tracker: Tracker,
    state: TrainState,
    announce: Announce,
    hooks_of: Callable[..., Sequence[Hook]],
) -> tuple[WrappedModel, TrainState]:
    """Trains to the end; returns what the last round left."""
    if state.iteration == train_iters(config.training):
        announce(
            f"> the run has reached iteration {state.iteration} of {train_iters(config.training)}: no step is left"
        )
    if config.checkpoint.save is None and config.checkpoint.save_hf is None:
        announce("> neither --save nor --save-hf is given: nothing of this training will be kept")
    assert inputs.data is not None
    run = Run(
        config=config,
        placement=placement,
        rounds=rounds,
        wrapped=wrapped,
        objective=inputs.method.objective(config),
        batches=PrefetchedSteps(
            inputs.data.training(share), stop=train_iters(config.training) * share.global_batch_size
        ),
        validation=inputs.data.validation(share),
        reference=reference,
        learning_rate=learning_rate(wrapped, rounds, config, state),
        tracker=tracker,
        announce=announce,
        state=state,
    )
    try:
        loaded_iteration = state.iteration if inputs.resumes else None
        base = starting_base(inputs, placement)
        with memory_errors_in_words(
            inputs,
            placement,
            bf16=config.training.bf16 is True,
            plan=lambda: run.wrapped.plan,
            when=lambda: f"in iteration {run.state.iteration + 1}",
        ):
            train(run, hooks_of(run, loaded_iteration=loaded_iteration, base=base))
        check_weights(run)
    finally:
        tracker.close()
    return run.wrapped, run.state


def _share(config: RunConfig, placement: Placement) -> BatchShare:
    return BatchShare(
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=global_batch_size(config, placement.world_size),
        data_parallel_rank=placement.data_rank,
        data_parallel_size=placement.data_size,
        length_multiple=placement.tensor_size,
    )


def _write_run_files(
    config: RunConfig, inputs: Inputs, placement: Placement, scores: dict[str, float] | None, announce: Announce
) -> None:
    """What the --save and --save-hf folders hold before the first step; what rank 0 can't write is UserError."""
    mistake = None
    if placement.rank == 0:
        identity = replace(inputs.identity, run_id=inputs.identity.run_id or secrets.token_hex(8))
        option, target = "--save", config.checkpoint.save
        try:
            if config.checkpoint.save is not None:
                _fill_save_folder(Path(config.checkpoint.save), config, identity, scores)
            exports = exports_of(config.checkpoint)
            if exports is not None:
                option, target = "--save-hf", config.checkpoint.save_hf
                for line in exports.begin(identity.run_id, inputs.position.iteration):
                    announce(f"> {line}")
        except OSError as error:
            mistake = f"{option} {target} can't be written: {error}; make room, or choose another folder."
    _raise_on_all(mistake, placement)


def _fill_save_folder(folder: Path, config: RunConfig, identity: RunIdentity, scores: dict[str, float] | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_resolved(config, folder / RESOLVED_CONFIG_FILE)
    if scores is not None:
        write_atomically(folder / SPECTRUM_FILE, json.dumps(scores, indent=1) + "\n")
    write_atomically(folder / RUN_IDENTITY_FILE, json.dumps(identity.to_dict(), indent=2) + "\n")
