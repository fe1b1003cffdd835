"""The rounds of a run: the plan of each iteration."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from hft_megatron.config import derived
from hft_megatron.config.declared import flag
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.names import SELECTIONS
from hft_megatron.config.run import RunConfig
from hft_megatron.data.order import SampleStream
from hft_megatron.errors import UserError
from hft_megatron.hft.on_ranks import check_agreement
from hft_megatron.hft.plan import Plan, make_plan
from hft_megatron.hft.rounds import RoundSchedule
from hft_megatron.hft.rules import RULES
from hft_megatron.optimizer.rounds import span_of_round
from hft_megatron.parallel.groups import Placement

_OF_SEVERAL_ROUNDS = {"hft_rotation": "independent", "hft_moments": "reset", "hft_lr_schedule": "run"}
"""Options about the change from one round to the next, with their defaults."""


class Rounds:
    """Schedule of the rounds, and their plans, which are drawn on demand."""

    def __init__(self, schedule: RoundSchedule, draw: Callable[[int], Plan]) -> None:
        """``draw`` makes the plan of a round, the same one whenever it is called."""
        self.schedule = schedule
        self._draw = draw
        self._newest: tuple[int, Plan] | None = None
        self._trained: set[str] = set()
        self._rounds_counted = 0

    def plan(self, round: int) -> Plan:
        """The plan of a round. Only the newest is kept: at 70B a thousand of them would fill hundreds of megabytes."""
        if self._newest is None or self._newest[0] != round:
            self._newest = round, self._draw(round)
        return self._newest[1]

    def agreed_plan(self, round: int, placement: Placement) -> Plan:
        """The plan of a round, which all ranks compare; UserError where they differ."""
        plan = self.plan(round)
        check_agreement(plan, coordinates=placement.coordinates)
        return plan

    def trained_until(self, round: int) -> frozenset[str]:
        """Units that any round up to and including this one trains; rounds must not decrease between calls."""
        assert round + 1 >= self._rounds_counted, "rounds only increase"
        for earlier in range(self._rounds_counted, round + 1):
            self._trained |= self.plan(earlier).training
        self._rounds_counted = round + 1
        return frozenset(self._trained)


def round_schedule(config: RunConfig, world_size: int, samples: SampleStream | None) -> RoundSchedule:
    """First iterations of the rounds of a run; ``samples`` as for ``rounds_of_run``."""
    train_iters, batches = derived.train_iters(config.training), derived.batch_sizes(config, world_size)
    stop = batches.samples_before(train_iters)
    by_epoch = samples is not None and config.hft.hft_round_interval == "epoch"
    return RoundSchedule(
        interval=config.hft.hft_round_interval,
        train_iters=train_iters,
        epoch_starts=samples.epoch_starts(stop) if samples is not None and by_epoch else (0,),
        batches=batches,
        first_round=config.hft.hft_first_round or 0,
    )


def rounds_of_run(
    config: RunConfig,
    shape: ModelShape,
    world_size: int,
    *,
    samples: SampleStream | None,
    loaded: Sequence[Plan],
    scores: Mapping[str, float] | None,
) -> Rounds:
    """The rounds of a run: with the plans ``loaded`` from a file, or drawn where there are none.

    ``samples`` fix the beginnings of epochs; None for a run that trains nothing. ``scores`` are those of
    ``--hft-selection spectrum``. Raises UserError for options that don't fit these rounds.
    """
    schedule = round_schedule(config, world_size, samples)

    def draw(round: int) -> Plan:
        if loaded:
            return loaded[round]
        return make_plan(shape, config.hft, default_seed=config.training.seed, round=round, scores=scores)

    rounds = Rounds(schedule, draw)
    if schedule.train_iters > 0:
        plan = rounds.plan(schedule.first_round)
        _check_warmup(config, schedule, plan)
        _check_growing_batches(config, schedule)
        _check_single_round(config, loaded, plan.policy.selection)
    return rounds


def _check_warmup(config: RunConfig, schedule: RoundSchedule, plan: Plan) -> None:
    """Refuse a learning rate that would be zero throughout, or never reach --lr."""
    per_round, unit = config.hft.hft_lr_schedule == "round", derived.schedule_unit(config.training)
    counts = "iterations" if unit == "iters" else unit
    length = span_of_round(config, schedule, schedule.first_round, cycle=None).length
    warmup = derived.warmup_steps(config.optimizer, length)
    selection = plan.policy.selection
    by_cycle = RULES[plan.policy.rule].cycle(plan.units, plan.policy.exact_ratio) is not None
    if by_cycle and warmup > 0:
        raise UserError(
            f"A warm-up of {warmup} {counts} (--lr-warmup-{unit}, --lr-warmup-fraction) would keep the first cycle "
            f"of --hft-selection {selection} at a learning rate of 0, because the rate changes only after a full "
            "cycle; leave it out."
        )
    if by_cycle and per_round:
        raise UserError(
            f"--hft-lr-schedule round has no effect with --hft-selection {selection}, whose learning rate changes "
            "after a full cycle of rounds; leave --hft-lr-schedule out."
        )
    if per_round and warmup >= length:
        raise UserError(
            f"--lr-warmup-{unit} {warmup} must be below the {length} {counts} of a round under "
            f"--hft-lr-schedule round; otherwise the full learning rate is never reached."
        )
    end, room = derived.wsd_decay_steps(config.optimizer), derived.decay_steps(config.optimizer, length) - warmup
    if per_round and end is not None and end > room:
        raise UserError(
            f"--lr-wsd-decay-{unit} {end} must be at most the {room} {counts} of a round's decay after its warm-up "
            f"under --hft-lr-schedule round."
        )


def _check_growing_batches(config: RunConfig, schedule: RoundSchedule) -> None:
    """Refuse batches larger than an epoch, which would skip its round."""
    ramp, full = config.training.rampup_batch_size, schedule.batches.full
    shortest = min((stop - start for start, stop in pairwise(schedule.epoch_starts)), default=full)
    if ramp and shortest < full:
        raise UserError(
            f"--rampup-batch-size {' '.join(map(str, ramp))}: under --hft-round-interval epoch no batch may be larger "
            f"than an epoch, but --global-batch-size is {full} and an epoch has {shortest} samples; give the "
            f"iterations of a round instead."
        )


def _check_single_round(config: RunConfig, loaded: Sequence[Plan], selection: str) -> None:
    """Refuse options about several rounds in a run that has one, where they would do nothing in silence."""
    hft = config.hft
    if hft.hft_round_interval != "stage" or hft.hft_first_round is not None:
        return  # several rounds, or one of those of several runs
    given = [
        f"{flag(name)} {getattr(hft, name)}"
        for name, default in _OF_SEVERAL_ROUNDS.items()
        if getattr(hft, name) != default
    ]
    if SELECTIONS[selection].is_of_rounds:
        given.append(f"--hft-selection {selection}")
    if len(loaded) > 1:
        given.append(f"--hft-plan {hft.hft_plan}, which has {len(loaded)} rounds,")
    if given:
        raise UserError(
            f"{given[0]} needs several rounds, but with --hft-round-interval stage the run has one; give the "
            "iterations of a round, such as --hft-round-interval 50, or leave the option out."
        )
