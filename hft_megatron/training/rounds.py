"""The rounds of a run: which plan each iteration trains under."""

from collections.abc import Callable, Sequence

from hft_megatron.hft.plan import Plan
from hft_megatron.hft.rounds import RoundSchedule


class Rounds:
    """Every round's plan, drawn when it is first asked for."""

    def __init__(self, schedule: RoundSchedule, draw: Callable[[int], Plan]) -> None:
        """``draw`` makes the plan of a round, the same whenever it is called."""
        self.schedule = schedule
        self._draw = draw
        self._plans: dict[int, Plan] = {}

    def plan(self, round: int) -> Plan:
        if round not in self._plans:
            self._plans[round] = self._draw(round)
        return self._plans[round]

    def trained_until(self, round: int) -> frozenset[str]:
        """Units that some round up to and with this one trains."""
        return frozenset[str]().union(*(self.plan(earlier).training for earlier in range(round + 1)))


def rounds_of_run(schedule: RoundSchedule, loaded: Sequence[Plan], draw: Callable[[int], Plan]) -> Rounds:
    """The rounds of a plan file, or drawn ones where there is none."""
    return Rounds(schedule, (lambda round: loaded[round]) if loaded else draw)
