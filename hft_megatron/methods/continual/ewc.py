"""Elastic weight consolidation (EWC): while a task is trained, weights that earlier tasks need are held in place.

The loss of a task gets ``lambda / 2 * sum_i F_i (theta_i - theta*_i)^2`` (Kirkpatrick et al. 2017, arXiv:1612.00796,
equation 3), in the online form with one running Fisher and one anchor (Schwarz et al. 2018, arXiv:1805.06370, with
gamma 1). ``theta*`` are the weights after the task before. ``F`` is the sum over all tasks before of the diagonal of
the empirical Fisher information: of the squared gradient of the loss (the mean over the tokens of a batch), at that
task's last weights, the mean over ``--ewc-batches`` batches of its training data.

- The batch's gradient is squared and not each example's, so that ``F``, and the right ``lambda``, depend on
  --global-batch-size. Whatever --objective says, it is the gradient of the plain loss.
- The penalty's gradient is added before the norm of the gradients is taken and clipped, as if it were in the loss. The
    logged loss is the task's alone; ``ewc penalty`` is logged beside it.
- In a step only units that train have ``F`` and ``theta*``: fp32 shards over data-parallel ranks, like optimizer state.
  Frozen ones cost nothing.
- After a task ``F`` is measured for all units, also for those that it didn't train: otherwise nothing would hold the
  next task's half. They take turns, in parts of about the size that a round trains, so that no part needs more
  memory than training did.

The code that came with TRACE (arXiv:2310.06762) does something else under this name: it sums squared gradients at every
training step, at weights that still move, with the penalty's own gradient among them, over all tasks and epochs without
a mean, in bf16.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from hft_megatron.checkpoint.fisher import (
    ANCHOR,
    FISHER,
    FisherFacts,
    check_fisher,
    keepers_of,
    read_facts,
    read_fisher,
    write_fisher,
)
from hft_megatron.checkpoint.folders import iteration_of
from hft_megatron.config.derived import train_iters
from hft_megatron.config.ewc import EwcConfig
from hft_megatron.config.loading import read_resolved
from hft_megatron.config.run_folder import FISHER_FOLDER, RESOLVED_CONFIG_FILE
from hft_megatron.errors import RunFailed, UserError
from hft_megatron.hft.plan import Plan
from hft_megatron.optimizer.carried import gathered_whole, spread
from hft_megatron.optimizer.penalty import QuadraticPenalty
from hft_megatron.parallel.consensus import gathered, on_rank_0
from hft_megatron.parallel.groups import Placement
from hft_megatron.trainer.inputs import Inputs
from hft_megatron.trainer.loop import Hook, rewrap
from hft_megatron.trainer.method import run_schedule
from hft_megatron.trainer.run import Run


@dataclass(frozen=True, kw_only=True)
class TasksBefore:
    """Fisher information and weights of the tasks before."""

    folder: Path
    facts: FisherFacts


def elastic_weights(inputs: Inputs, placement: Placement) -> Sequence[Hook]:
    """The hook of a run with --ewc-lambda; none for another run, or for a task that is done and measured. Collective.

    The tasks before are those of the run whose weights --finetune took. Raises UserError where that run measured its
    Fisher information and it is missing, damaged, or of other weights than this run takes.
    """
    options, source = inputs.config.ewc, inputs.identity.finetuned_from
    if options.ewc_lambda == 0 or on_rank_0(lambda: _is_over(inputs)):
        return ()
    before = None
    if source is not None:
        before = on_rank_0(lambda: _tasks_before(Path(source), inputs))
    if before is not None:
        check_fisher(before.folder, placement)
    return (ElasticWeights(options, before, inputs.config.checkpoint.save),)


def _is_over(inputs: Inputs) -> bool:
    """True if the run has no step left and has been measured: the run before may be deleted by then."""
    save, reached = inputs.config.checkpoint.save, inputs.position.iteration
    if save is None or reached < train_iters(inputs.config.training):
        return False
    facts = read_facts(Path(save) / FISHER_FOLDER)
    return facts is not None and facts.iteration == reached


def _tasks_before(source: Path, inputs: Inputs) -> TasksBefore | None:
    folder, facts = source / FISHER_FOLDER, read_facts(source / FISHER_FOLDER)
    if not source.is_dir():
        raise UserError(
            f"--ewc-lambda: {source}, whose weights this run started from and is held to, is missing; put it back."
        )
    if facts is None:
        if read_resolved(source / RESOLVED_CONFIG_FILE).ewc.ewc_lambda == 0:
            return None
        raise UserError(
            f"--ewc-lambda needs {folder}, where the task in --load {source} writes its Fisher information at its end, "
            f"and it is missing; let that task end, or start from one that was trained without --ewc-lambda."
        )
    if not inputs.resumes:
        assert inputs.checkpoint is not None
        if iteration_of(inputs.checkpoint) != facts.iteration:
            raise UserError(
                f"--ewc-lambda needs the Fisher information of {inputs.checkpoint}, whose weights --finetune takes, "
                f"but {folder} has that of iteration {facts.iteration}; let the task in --load {source} end."
            )
    return TasksBefore(folder=folder, facts=facts)


@dataclass
class ElasticWeights(Hook):
    """Holds trainable weights to the tasks before, and measures the run's own task at its end."""

    options: EwcConfig
    before: TasksBefore | None
    """None in the first task, which is held to nothing."""
    save: str | None

    def at_round_start(self, run: Run) -> None:
        if run.is_complete:  # but not measured yet
            return
        if self.before is None:
            run.announce("> ewc: no earlier task: nothing holds the weights")
            return
        run.wrapped.shards.penalty = held = self._penalty(run, self.before.folder)
        run.announce(
            f"> ewc: {len(run.wrapped.plan.training)} units are held to their weights after "
            f"{self.before.facts.tasks} tasks, in {held.bytes / 1e6:,.1f} MB of this rank"
        )

    def _penalty(self, run: Run, folder: Path) -> QuadraticPenalty:
        kept = read_fisher(folder, run.wrapped, (FISHER, ANCHOR), run.placement)
        by_unit, group = keepers_of(run.wrapped, run.placement), run.placement.groups.dp
        shards: dict[str, dict[Parameter, Tensor]] = {FISHER: {}, ANCHOR: {}}
        for slot in run.wrapped.training_slots:
            held = run.wrapped.shards.range_of(slot.parameter)
            for name, found in shards.items():
                mine = kept[slot.unit][name] if slot.unit in kept else None
                whole = spread(mine, slot.parameter, by_unit[slot.unit], group)
                if held is not None:
                    found[slot.parameter] = whole[held].clone()
        return QuadraticPenalty(strength=self.options.ewc_lambda, curvature=shards[FISHER], anchor=shards[ANCHOR])

    def at_end(self, run: Run) -> None:
        """Runs after the last checkpoint: the optimizer's state is freed, and other units take turns."""
        if self.save is None:
            run.announce("> ewc: without --save the Fisher information of this task is not measured")
            return
        folder, batches = Path(self.save) / FISHER_FOLDER, list(_batches(run, self.options.ewc_batches))
        facts = FisherFacts(
            iteration=run.state.iteration,
            batches=len(batches),
            tasks=1 + (0 if self.before is None else self.before.facts.tasks),
        )
        begun = time.perf_counter()
        fisher = self._fisher(run, batches)
        with run.wrapped.gathered_parameters():
            write_fisher(folder, run.wrapped, fisher, facts, run.placement)
        run.announce(
            f"> ewc: wrote the Fisher information of this task, over {len(batches)} batches, to {folder} "
            f"({time.perf_counter() - begun:,.1f} s)"
        )

    def _fisher(self, run: Run, batches: Sequence[int]) -> dict[str, Tensor]:
        """unit -> (elements,) fp32, the sum over tasks up to this one, for the units that this rank keeps."""
        run.wrapped.shards.penalty = None
        by_unit, group, shares = keepers_of(run.wrapped, run.placement), run.placement.groups.dp, {}
        for part, units in enumerate(parts_of(run.wrapped.plan)):
            if part > 0:
                # Nothing is carried over: moments are in the checkpoint.
                rewrap(run, replace(run.wrapped.plan, training=units), replace(run.config.hft, hft_moments="reset"))
            squares = _squared_gradients(run, batches)
            before = {}
            if self.before is not None:
                before = read_fisher(self.before.folder, run.wrapped, (FISHER,), run.placement)
            for slot in run.wrapped.training_slots:
                held = run.wrapped.shards.range_of(slot.parameter)
                mine = squares.pop(slot.parameter, None)
                whole = gathered_whole(mine, held, slot.parameter, by_unit[slot.unit], group)
                if whole is not None:
                    shares[slot.unit] = whole.cpu()
                    if self.before is not None:
                        shares[slot.unit] += before[slot.unit][FISHER]
        _check_finite(shares)
        return shares


def _batches(run: Run, most: int) -> Iterator[int]:
    """Numbers of samples before each batch: of the run's first iterations that were not left out."""
    sizes, left_out = run.rounds.schedule.batches, set(run.state.skipped_iterations)
    kept = (number for number in range(run.state.iteration) if number + 1 not in left_out)
    return (sizes.samples_before(number) for number in islice(kept, most))


def parts_of(plan: Plan) -> list[frozenset[str]]:
    """The units that the plan trains, and the other units in parts of about the same size."""
    others = [unit for unit in plan.units if not plan.trains(unit.name)]
    count = ceil(sum(unit.parameters for unit in others) / plan.trainable_parameters)
    parts, filled = [set[str]() for _ in range(count)], [0] * count
    for unit in sorted(others, key=lambda unit: unit.parameters, reverse=True):
        emptiest = filled.index(min(filled))
        parts[emptiest].add(unit.name)
        filled[emptiest] += unit.parameters
    return [plan.training, *(frozenset(part) for part in parts if part)]


def _squared_gradients(run: Run, batches: Sequence[int]) -> dict[Parameter, Tensor]:
    """Mean over batches of trainable weights' squared gradients; this rank's shards, (elements,) fp32. Collective."""
    shards, likelihood = run.wrapped.shards, run.objective.unweighted or run.objective
    squares = {p: torch.zeros_like(shard) for p, shard in shards.updated_shards().items()}
    with run.wrapped.gathered_parameters():
        for consumed in batches:
            run.wrapped.zero_gradients()
            batch = run.batches.step(consumed)
            run_schedule(likelihood.forward_step, run.wrapped.chunks, batch, forward_only=False)
            for parameter, gradient in shards.reduced_gradients().items():
                squares[parameter].addcmul_(gradient, gradient, value=1 / len(batches))
    return squares


def _check_finite(fisher: dict[str, Tensor]) -> None:
    bad = [unit for unit, values in fisher.items() if not bool(values.isfinite().all())]
    for unit in sorted(unit for one in gathered(bad) for unit in one):
        raise RunFailed(
            f"the Fisher information of {unit} is not finite: a gradient of this task's is too large at its last "
            f"weights; train it with a lower --lr."
        )
