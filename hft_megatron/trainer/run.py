"""One run as a value: what the loop and its hooks work on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from hft_megatron.checkpoint.position import TrainState
from hft_megatron.config.derived import train_iters
from hft_megatron.config.run import RunConfig
from hft_megatron.costs.flops import ExtraWork
from hft_megatron.data.batches import StepBatch, TrainingSteps, ValidationSteps
from hft_megatron.errors import RunFailed
from hft_megatron.optimizer.rounds import LearningRate
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.parallel.groups import Placement
from hft_megatron.tracking.tracker import CompositeTracker, Metrics, Tracker
from hft_megatron.trainer.method import Objective
from hft_megatron.trainer.rounds import Rounds


class Reference(Protocol):
    """What is asked before the passes of a step: the model that is compared with, or the trained one itself."""

    @property
    def held_bytes(self) -> int:
        """What it keeps in this rank's memory."""

    @property
    def extra_work(self) -> ExtraWork:
        """The products that a step makes because of it, of every batch."""

    def attach(self, batch: StepBatch) -> None:
        """Give each micro-batch what its objective reads: of pairs their ``reference``, (pairs, 2) fp64, the
        log-probabilities of the answers in nats."""


@dataclass(kw_only=True)
class Run:
    """A wrapped model, its data and where it stands. With every step ``state`` changes, with every round the rest of
    what belongs to its plan: ``wrapped`` and ``learning_rate``."""

    config: RunConfig
    placement: Placement
    rounds: Rounds
    wrapped: WrappedModel
    objective: Objective
    batches: TrainingSteps
    validation: Mapping[str, ValidationSteps]
    """By the names of the sources."""
    reference: Reference | None = None
    """None where a batch has all that its objective reads."""
    sequences_per_sample: int = 1
    """See ``Method``."""
    learning_rate: LearningRate
    tracker: CompositeTracker
    announce: Callable[[str], None]
    """Prints one line on rank 0."""
    state: TrainState
    switch_ms: float | None = None
    """How long the switch to this round took; None in the round that the run started in."""
    failure: str | None = None
    """Why this rank can't go on; the others learn of it after the step."""

    @property
    def length(self) -> int:
        """Optimizer steps of the whole run."""
        return train_iters(self.config.training)

    @property
    def is_complete(self) -> bool:
        """Whether no step is left."""
        return self.state.iteration >= self.length

    @property
    def coming_samples(self) -> range:
        """The run's samples that the coming iteration takes."""
        consumed = self.state.consumed_samples
        return range(consumed, consumed + self.batches.share.sizes.after(consumed))

    @property
    def is_to_skip(self) -> bool:
        """Whether --iterations-to-skip names the coming iteration."""
        return self.state.iteration + 1 in self.config.training.iterations_to_skip

    def advance(self, *, updated: bool) -> None:
        """One step is done, or was left out."""
        iteration = self.state.iteration + 1
        skipped, asked = self.state.skipped_iterations, self.state.asked_to_skip
        self.state = replace(
            self.state,
            iteration=iteration,
            skipped_iterations=skipped if updated else (*skipped, iteration),
            asked_to_skip=(*asked, iteration) if self.is_to_skip else asked,
            consumed_samples=self.coming_samples.stop,
        )

    def log(self, metrics: Metrics, tracker: Tracker | None = None) -> None:
        """Records what was measured after this iteration, in one tracker or in all; where that can't be written, notes
        the failure."""
        try:
            (tracker or self.tracker).log(self.state.iteration, metrics)
        except RunFailed as failure:
            self.failure = str(failure)
