"""Checks a run, or its stages, before a model is built; and runs stages one after the other.

After a stop they resume in the stage that they were in.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from hft_megatron.checkpoint.finished import Reached, discarded, reached
from hft_megatron.checkpoint.folders import complete_checkpoints
from hft_megatron.config import derived
from hft_megatron.config.loading import read_resolved
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.names import MethodName
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import RESOLVED_CONFIG_FILE
from hft_megatron.config.run_identity import RunIdentity
from hft_megatron.config.stages import Stage, numbered, with_rounds_in_turn
from hft_megatron.config.validation import shape_of
from hft_megatron.conversion.save import Announce
from hft_megatron.data.order import with_iterations
from hft_megatron.errors import OnLoss, UserError
from hft_megatron.parallel.groups import leave_groups, stop_groups
from hft_megatron.parallel.peers import Peers, peers
from hft_megatron.trainer.assembly import train_and_export
from hft_megatron.trainer.bill import announce_bill_of_stages
from hft_megatron.trainer.inputs import check_not_discarded, read_inputs, tokenizer_and_shape
from hft_megatron.trainer.loop import Hook
from hft_megatron.trainer.method import Method
from hft_megatron.trainer.resume import with_schedule

Methods = Mapping[MethodName, Method]


def check_inputs(
    method: Method, config: RunConfig, shape: ModelShape | None, world_size: int, announce: Announce
) -> None:
    """Reads tokenizer, data and the saved run, and announces a summary; UserError for the first mistake."""
    inputs = read_inputs(method, config, shape, world_size)
    check_not_discarded(inputs.found)
    for line in inputs.describe():
        announce(line)
    with_schedule(inputs, world_size, announce)


def check_stages(stages: Sequence[Stage], world_size: int, methods: Methods) -> tuple[list[str], list[int]]:
    """Reads the tokenizer and the data of every stage; returns lines with a summary, and the iterations of each.

    UserError for the first mistake, so that one in a later stage is not found after the training of an earlier one.
    """
    lines, iterations = [], []
    for number, stage in enumerate(with_rounds_in_turn(stages)):
        tokenizer, shape = tokenizer_and_shape(stage.config, shape_of(stage.config.model))
        assert tokenizer is not None
        config = derived.resolve(stage.config, shape, world_size)
        data = methods[stage.method].read_data(config, tokenizer, shape, world_size)
        found = [*tokenizer.facts.notes, *data.describe()]
        lines += [f"stage {number} ({stage.method}): {line}" for line in found]
        if data.samples is not None:
            config = with_iterations(config, data.samples, world_size)
        iterations.append(derived.train_iters(config.training))
    return lines, iterations


def run_stages(
    stages: Sequence[Stage], shape: ModelShape | None, world_size: int, methods: Methods, *, on_loss: OnLoss
) -> None:
    """Trains every stage that isn't done; every rank calls it under torchrun's environment.

    Raises the errors of ``run_training``. Each stage takes the weights of the one before from its last checkpoint, and
    continues the numbers of its rounds.
    """
    minutes = stages[0].config.parallel.distributed_timeout_minutes
    with peers(minutes, on_loss) as company:
        check_stages(stages, world_size, methods)
        run_what_is_left(stages, shape, world_size, methods, company)
        company.leave()
        stop_groups()


def run_what_is_left(
    stages: Sequence[Stage],
    shape: ModelShape | None,
    world_size: int,
    methods: Methods,
    company: Peers,
    *,
    hooks: Callable[[int], Sequence[Hook]] = lambda number: (),
    after_saving: Callable[[int], Sequence[Hook]] = lambda number: (),
    when_over: Callable[[int], None] = lambda number: None,
) -> None:
    """``run_stages`` among ranks that have met, with ``hooks`` of a stage, by its number, before those that save, and
    ``after_saving`` after them. ``when_over`` is called on every rank when a stage is complete."""
    rank, first_round, next_round = int(os.environ["RANK"]), 0, 0
    for number, stage in enumerate(stages):
        following = stages[number + 1] if number + 1 < len(stages) else None
        first_round = first_round if stage.shares_rounds else next_round
        one = numbered(stage, first_round)
        if _is_over(stage, following):
            last_round = _where_it_ended(one, methods[one.method], following, shape, world_size).round
        else:
            if rank == 0:
                print(f"> stage {number} of {len(stages)}: {stage.method} in {stage.folder}", flush=True)
            # Not read from its checkpoint: another host's folder may show the last one a minute later.
            last_round = train_and_export(
                methods[one.method],
                one.config,
                shape,
                world_size,
                company,
                hooks=hooks(number),
                after_saving=after_saving(number),
                of_a_stage=True,
            )
            when_over(number)
            leave_groups()
        # A stage that shares rounds may have fewer of them than the one before.
        next_round = max(next_round, last_round + 1)
    if rank == 0:
        announce_bill_of_stages([stage.folder for stage in stages], lambda text: print(text, flush=True))


def _is_over(stage: Stage, following: Stage | None) -> bool:
    """Return whether another stage has started from its last weights, so that its training cannot continue."""
    if discarded(stage.folder) is not None:
        return True
    return following is not None and (
        bool(complete_checkpoints(str(following.folder))) or discarded(following.folder) is not None
    )


def _where_it_ended(
    stage: Stage, method: Method, following: Stage | None, shape: ModelShape | None, world_size: int
) -> Reached:
    """Last position of a stage that is over; UserError where its options describe another length, or where it is
    gone."""
    begun = "a later stage" if following is None else str(following.folder)
    ended = reached(stage.folder)
    if ended is None:
        raise UserError(
            f"{stage.folder} holds no complete checkpoint, but {begun} has started from one; put it back, or choose "
            f"another --save."
        )
    config = stage.config
    if discarded(stage.folder) is not None:
        # Nothing is loaded: neither its own checkpoints nor those that it started from need exist.
        own = replace(config.checkpoint, load=str(stage.folder), finetune=False, exit_on_missing_checkpoint=False)
        config = replace(config, checkpoint=own)
        identity = RunIdentity.read("--save", str(stage.folder))
        # Unset options take the run's values, as with a checkpoint.
        saved = read_resolved(stage.folder / RESOLVED_CONFIG_FILE)
        config = derived.resolve(config, identity.shape, world_size, saved)
    asked = derived.train_iters(read_inputs(method, config, shape, world_size).config.training)
    if asked != ended.iteration:
        raise UserError(
            f"{stage.folder} ended at iteration {ended.iteration}, from which {begun} has started, but the options now "
            f"give it {asked} iterations; give {ended.iteration}, or choose another --save."
        )
    return ended
