"""Finds the rank that holds the others up, by compute times without the waits for others."""

from dataclasses import dataclass, field
from statistics import median

import torch
import torch.distributed as dist

from hft_megatron.parallel.groups import host_name
from hft_megatron.tracking import tracker as names
from hft_megatron.training.run import Run
from hft_megatron.training.step import StepResult

NAMED_FROM = 1.3
"""Times the median of all ranks from which the slowest one is named."""


@dataclass
class ComputeTimes:
    """Adds up this rank's compute times from one record to the next."""

    _milliseconds: float = 0.0
    _steps: int = 0
    _places: list[str] = field(default_factory=list)

    def add(self, result: StepResult) -> None:
        """A step is done."""
        self._milliseconds += result.times.compute
        self._steps += 1

    def take(self, run: Run) -> dict[str, float | str]:
        """Median and worst of all ranks per step, and who is the slowest, by their names in the log, since the last
        call; nothing of a run of one rank. Collective: 8 bytes of every rank."""
        placement = run.placement
        mean, self._milliseconds, self._steps = self._milliseconds / self._steps, 0.0, 0
        if placement.world_size == 1:
            return {}
        if not self._places:
            self._places = [""] * placement.world_size
            mine = f"rank {placement.rank} on {host_name()} ({placement.coordinates})"
            dist.all_gather_object(self._places, mine)
        times = torch.zeros(placement.world_size, dtype=torch.float64, device=placement.device)
        times[placement.rank] = mean
        dist.all_reduce(times)
        return in_words(times.tolist(), self._places)


def in_words(times: list[float], places: list[str]) -> dict[str, float | str]:
    """Milliseconds of every rank, and where each is -> what the log has."""
    middle, worst = median(times), max(times)
    found: dict[str, float | str] = {names.COMPUTE_TIME_MEDIAN: middle, names.COMPUTE_TIME_WORST: worst}
    if worst >= NAMED_FROM * middle > 0:
        found[names.SLOWEST_RANK] = f"{places[times.index(worst)]}, {worst / middle:.2f} x the median compute time"
    return found
