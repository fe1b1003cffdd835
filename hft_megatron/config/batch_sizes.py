"""Number of samples in every iteration of a run: the one place that knows of --rampup-batch-size."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter


@dataclass(frozen=True, kw_only=True)
class _Stretch:
    """Iterations one after the other whose batches have one size."""

    iteration: int
    """Number of the first one, from 0."""
    samples: int
    """Samples that come before it."""
    size: int


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """Samples of every iteration, over all ranks. Iterations count from 0: ``iteration`` is about to run."""

    full: int
    """--global-batch-size."""
    ramp: tuple[int, ...] = ()
    """START, INCREMENT and SAMPLES of --rampup-batch-size; empty where every batch is full."""

    def after(self, samples: int) -> int:
        """The size of a batch that begins after so many samples.

        Megatron's rule (``RampupBatchsizeNumMicroBatchesCalculator`` of megatron-core 0.16; 0.19 has none): the ramp's
        samples are shared out evenly among its sizes below the full one, and a batch has the size of the share that it
        begins in.
        """
        if not self.ramp or samples > self.ramp[2]:
            return self.full
        start, increment, ramp_samples = self.ramp
        share = ramp_samples / ((self.full - start) // increment)
        # Divided in floating point, as there: where a share is no whole number, its last sample depends on that.
        return start + int(samples / share) * increment

    def of(self, iteration: int) -> int:
        """The size of an iteration's batch."""
        return self._at(iteration).size

    def samples_before(self, iteration: int) -> int:
        """Samples that all iterations before one take together."""
        stretch = self._at(iteration)
        return stretch.samples + (iteration - stretch.iteration) * stretch.size

    def first_from(self, samples: int) -> int:
        """The first iteration that begins after so many samples or more."""
        index = bisect_right(self._stretches, samples, key=attrgetter("samples")) - 1
        stretch = self._stretches[index]
        return stretch.iteration + -(-(samples - stretch.samples) // stretch.size)

    def iterations_of(self, samples: int) -> int:
        """Iterations of a run of --train-samples, which must be more than those of the ramp.

        Megatron's rule: full batches that would take more are left out, while the ramp is gone through to its end.
        """
        ramp = self._stretches[-1]
        return ramp.iteration + max(samples - ramp.samples, 0) // ramp.size

    def _at(self, iteration: int) -> _Stretch:
        return self._stretches[bisect_right(self._stretches, iteration, key=attrgetter("iteration")) - 1]

    @cached_property
    def _stretches(self) -> tuple[_Stretch, ...]:
        found, iteration, samples = list[_Stretch](), 0, 0
        ramp_samples = self.ramp[2] if self.ramp else -1
        while samples <= ramp_samples:
            first = _Stretch(iteration=iteration, samples=samples, size=self.after(samples))
            found.append(first)
            # Sizes only grow, so that those of the batches that follow can be searched.
            following = range(samples + first.size, ramp_samples + 1, first.size)
            count = 1 + bisect_right(following, first.size, key=self.after)
            iteration, samples = iteration + count, samples + count * first.size
        return (*found, _Stretch(iteration=iteration, samples=samples, size=self.full))
