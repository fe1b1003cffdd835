"""Assembles a run in the order of a job: inputs, ranks, model, plan, optimizer, checkpoint, loop, export."""

from collections.abc import Callable, Sequence
from functools import partial

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.run import RunConfig
from hft_megatron.errors import OnLoss, Stopped
from hft_megatron.optimizer.wrapping import wrap
from hft_megatron.parallel.groups import stop_groups
from hft_megatron.parallel.peers import Peers, peers
from hft_megatron.trainer.hooks import build_hooks
from hft_megatron.trainer.inputs import check_not_discarded, read_inputs
from hft_megatron.trainer.loop import Hook, learning_rate, train
from hft_megatron.trainer.method import Method
from hft_megatron.trainer.out_of_memory import memory_errors_in_words
from hft_megatron.trainer.prepare import Prepared, prepare
from hft_megatron.trainer.resume import starting_base, starting_model, starting_state
from hft_megatron.trainer.run import Run
from hft_megatron.trainer.saving import Exporter, Signals, write_run_files


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
    """Trains (or, with --train-iters 0, validates and converts) and exports; every rank calls it under torchrun's
    environment.

    Raises UserError for a user's mistake before a model is built, PeersLost where the ranks do not meet, Stopped after
    a signal or a time limit, once the checkpoint is saved. A host that is lost later is named to ``on_loss``, on
    another thread, and the process ends. ``hooks`` are a user's own. ``signals`` listen while it trains and exports,
    and after a failure until the caller closes them, which a process that then ends need not do.
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
    after_saving: Sequence[Hook] = (),
    signals: Signals | None = None,
    of_a_stage: bool = False,
) -> int:
    """``run_training`` that keeps the process groups, for a stage that follows; returns the last round.

    ``after_saving`` are hooks that run after those that save. ``of_a_stage``: it ends with a line instead of the whole
    bill.
    """
    inputs = read_inputs(method, options, shape, world_size)
    check_not_discarded(inputs.found)
    start = prepare(inputs, world_size, company)
    last = start.inputs.method.last_hooks(start.inputs, start.placement)
    behind = [*start.evaluations(), *after_saving, *last]
    hooks_of = partial(build_hooks, own=hooks, after_saving=behind, of_a_stage=of_a_stage)
    with memory_errors_in_words(
        start.inputs, start.placement, plan=lambda: start.plan, when=lambda: "while loading or exporting"
    ):
        try:
            return _from_weights_to_export(start, hooks_of, signals or Signals())
        except Stopped:
            company.leave()
            stop_groups()
            raise


def _from_weights_to_export(start: Prepared, hooks_of: Callable[..., Sequence[Hook]], signals: Signals) -> int:
    """Builds the model, trains or validates it, and exports; returns the last round."""
    inputs, placement, announce, config = start.inputs, start.placement, start.announce, start.config
    chunks = starting_model(inputs, placement, announce)
    reference = None
    if start.tracker is not None and inputs.method.reference is not None:
        reference = inputs.method.reference(inputs, chunks, start.rounds, start.share, placement, announce)
    exporter = Exporter(config.checkpoint, inputs, placement, announce)
    if not start.trains and not inputs.resumes:
        start.validate(chunks, reference, 0)
        exporter.export_at_end(chunks, frozenset(), 0)
        return inputs.position.round
    wrapped = wrap(
        chunks,
        start.plan,
        config.parallel,
        config.optimizer,
        bf16=config.training.bf16 is True,
        fp32_gradients=config.training.accumulate_allreduce_grads_in_fp32,
        steps_per_unit=config.hft.hft_moments == "carry",
    )
    state = starting_state(inputs, placement, wrapped, announce)
    if start.trains:
        assert inputs.data is not None
        assert start.tracker is not None
        write_run_files(inputs, start.scores, announce)
        signals.listen()
        run = Run(
            config=config,
            placement=placement,
            rounds=start.rounds,
            wrapped=wrapped,
            objective=inputs.method.objective(config),
            batches=start.training_steps(),
            validation=inputs.data.validation(start.share),
            reference=reference,
            sequences_per_sample=inputs.method.sequences_per_sample,
            learning_rate=learning_rate(wrapped, start.rounds, config, state),
            tracker=start.tracker,
            announce=announce,
            state=state,
        )
        _train(run, start, partial(hooks_of, exporter=exporter, signals=signals))
        wrapped, state = run.wrapped, run.state
    with wrapped.gathered_parameters():
        if not start.trains:
            start.validate(chunks, reference, state.iteration)
        exporter.export_at_end(chunks, start.rounds.trained_until(state.round), state.iteration, wrapped)
    signals.close()  # not before, so that a trained model is exported, and not after a failure
    return state.round


def _train(run: Run, start: Prepared, hooks_of: Callable[..., Sequence[Hook]]) -> None:
    """Trains to the end, and closes the tracker whatever happens."""
    if run.is_complete:
        run.announce(f"> the run is complete: iteration {run.state.iteration} of {run.length}, no steps left")
    outputs = run.config.checkpoint
    if outputs.save is outputs.save_hf is outputs.save_lora is None:
        run.announce("> neither --save nor --save-hf is given: the trained weights will not be kept")
    try:
        loaded = run.state.iteration if start.inputs.resumes else None
        base = starting_base(start.inputs, run.placement)
        with memory_errors_in_words(
            start.inputs,
            run.placement,
            plan=lambda: run.wrapped.plan,
            when=lambda: f"in iteration {run.state.iteration + 1}",
        ):
            train(run, hooks_of(run, loaded_iteration=loaded, base=base))
    finally:
        run.tracker.close()
