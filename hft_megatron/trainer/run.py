"""One run as a value, for the loop and its hooks."""

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
    """The model that objectives compare with, used before the passes of a step: another one, or the trained one."""

    @property
    def held_bytes(self) -> int:
        """Bytes that it keeps in this rank's memory."""

    @property
    def extra_work(self) -> ExtraWork:
        """The work that it adds to a step."""

    def attach(self, batch: StepBatch) -> None:
        """Adds to each micro-batch the values that its objective reads: for pairs their ``reference``, (pairs, 2) fp64,
        the log-probabilities of the answers in nats."""


@dataclass(kw_only=True)
class Run:
    """A wrapped model, its data and its position. ``state`` changes with every step, ``wrapped`` and ``learning_rate``
    with every round."""

    config: RunConfig
    placement: Placement
    rounds: Rounds
    wrapped: WrappedModel
    objective: Objective
    batches: TrainingSteps
    validation: Mapping[str, ValidationSteps]
    """Validation data by the names of the sources."""
    reference: Reference | None = None
    """None where a batch has everything that its objective reads."""
    sequences_per_sample: int = 1
    """See ``Method``."""
    learning_rate: LearningRate
    tracker: CompositeTracker
    announce: Callable[[str], None]
    """Prints one line on rank 0."""
    state: TrainState
    switch_ms: float | None = None
    """Milliseconds of the switch to this round; None in the round that the run started in."""
    failure: str | None = None
    """Error for which this rank cannot continue; the others learn of it after the step."""

    @property
    def length(self) -> int:
        """Optimizer steps of the whole run."""
        return train_iters(self.config.training)

    @property
    def is_complete(self) -> bool:
        """Return whether no step is left."""
        return self.state.iteration >= self.length

    @property
    def coming_samples(self) -> range:
        """The run's samples in the coming iteration."""
        consumed = self.state.consumed_samples
        return range(consumed, consumed + self.batches.share.sizes.after(consumed))

    @property
    def is_to_skip(self) -> bool:
        """Return whether --iterations-to-skip names the coming iteration."""
        return self.state.iteration + 1 in self.config.training.iterations_to_skip

    def advance(self, *, updated: bool) -> None:
        """Counts one step, which was taken or skipped."""
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
        """Records values measured after this iteration, in one tracker or in all; notes the failure where they cannot
        be written."""
        try:
            (tracker or self.tracker).log(self.state.iteration, metrics)
        except RunFailed as failure:
            self.failure = str(failure)
