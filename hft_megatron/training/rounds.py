"""The rounds of a run: which plan each iteration trains under."""

from collections.abc import Callable, Mapping, Sequence

from hft_megatron.config import derived
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.schema import RunConfig
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan, make_plan
from hft_megatron.hft.rounds import RoundSchedule


class Rounds:
    """When each round begins, and its plan, which is drawn when it is first asked for."""

    def __init__(self, schedule: RoundSchedule, draw: Callable[[int], Plan]) -> None:
        """``draw`` makes the plan of a round, the same one whenever it is called."""
        self.schedule = schedule
        self._draw = draw
        self._plans: dict[int, Plan] = {}

    def plan(self, round: int) -> Plan:
        """The plan of a round."""
        if round not in self._plans:
            self._plans[round] = self._draw(round)
        return self._plans[round]

    def trained_until(self, round: int) -> frozenset[str]:
        """Units that some round up to and with this one trains."""
        return frozenset[str]().union(*(self.plan(earlier).training for earlier in range(round + 1)))


def rounds_of_run(
    config: RunConfig,
    shape: ModelShape,
    world_size: int,
    *,
    samples_per_epoch: int,
    loaded: Sequence[Plan],
    scores: Mapping[str, float] | None,
) -> Rounds:
    """The rounds of a run: with the plans ``loaded`` from a file, or drawn where there are none.

    ``scores`` are those of ``--hft-selection spectrum``. Raises UserError when a round with a schedule of its own is
    not longer than the warm-up.
    """
    schedule = RoundSchedule(
        interval=config.hft.hft_round_interval,
        train_iters=config.training.train_iters,
        samples_per_epoch=max(samples_per_epoch, 1),
        global_batch_size=derived.global_batch_size(config, world_size),
    )
    _check_warmup(config, schedule)

    def draw(round: int) -> Plan:
        if loaded:
            return loaded[round]
        return make_plan(shape, config.hft, default_seed=config.training.seed, round=round, scores=scores)

    return Rounds(schedule, draw)


def _check_warmup(config: RunConfig, schedule: RoundSchedule) -> None:
    if config.hft.hft_lr_schedule != "round" or config.training.train_iters == 0:
        return
    start, stop = schedule.bounds(0)
    warmup = derived.warmup_iters(config.optimizer, stop - start)
    if warmup >= stop - start:
        raise UserError(
            f"--lr-warmup-iters {warmup} must be below the {stop - start} iterations of a round under "
            f"--hft-lr-schedule round, or the full learning rate is never reached."
        )
