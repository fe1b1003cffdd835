"""First and last iterations of rounds. Pure arithmetic; the switch itself is the training loop's."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from hft_megatron.config.batch_sizes import BatchSizes


@dataclass(frozen=True, kw_only=True)
class RoundSchedule:
    """The rounds of one stage. Iterations count finished ones: iteration 0 is about to run when nothing has."""

    interval: str
    """``stage`` (the stage is one round), ``epoch``, or a number of iterations, as in ``--hft-round-interval``."""
    train_iters: int
    epoch_starts: Sequence[int]
    """Number of samples before each epoch, up to and including the first number that the iterations don't exceed. Used
    for ``epoch`` alone."""
    batches: BatchSizes
    first_round: int = 0
    """Number of the stage's first round: the count of rounds in the stages before it."""

    def round_of(self, iteration: int) -> int:
        """The round of the iteration that is about to run, and after the last iteration the last round.

        A batch may hold the end of one epoch and the beginning of the next: a round of an epoch begins with the first
        iteration whose batch begins in that epoch. A batch larger than an epoch is one round.
        """
        assert iteration >= 0, iteration
        iteration = max(0, min(iteration, self.train_iters - 1))
        if self.interval == "stage":
            return self.first_round
        if self.interval == "epoch":
            epoch = bisect_right(self.epoch_starts, self.batches.samples_before(iteration)) - 1
            return self.first_round + min(iteration, epoch)
        return self.first_round + iteration // int(self.interval)

    def bounds(self, round: int) -> tuple[int, int]:
        """(start, stop): the round's iterations are start, start + 1, ..., stop - 1; none of a round after the end."""
        assert round >= self.first_round, f"round {round} is not of this stage"
        return self._start(round - self.first_round), self._start(round - self.first_round + 1)

    @property
    def rounds(self) -> int:
        """Rounds that the stage needs; a stage without iterations has the plan of one."""
        return self.round_of(self.train_iters) - self.first_round + 1

    def _start(self, index: int) -> int:
        """First iteration of the stage's round ``index``; past the last round, the end of the stage."""
        if index == 0:
            return 0
        if self.interval == "stage":
            return self.train_iters
        if self.interval == "epoch":
            if index >= len(self.epoch_starts):
                return self.train_iters
            start = max(index, self.batches.first_from(self.epoch_starts[index]))
        else:
            start = index * int(self.interval)
        return min(start, self.train_iters)
