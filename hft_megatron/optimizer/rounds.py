"""The learning rate over a run's rounds, and the switch of a wrapped model from one round to the next."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from hft_megatron.config.derived import decay_steps, schedule_length, warmup_steps, wsd_decay_steps
from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.optimizer import OptimizerConfig
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.hft.plan import Plan
from hft_megatron.hft.rounds import RoundSchedule
from hft_megatron.model.parameters import parameter_slots
from hft_megatron.optimizer.carried import CarriedState, give_state, take_state
from hft_megatron.optimizer.wrapping import WrappedModel, unwrap, wrap


@dataclass(frozen=True, kw_only=True)
class Span:
    """One pass of the schedule, in its steps: iterations, or samples under --train-samples."""

    length: int
    position: Callable[[int], int]
    """Steps done after a number of iterations of the run. Iterations without an update don't count: as in Megatron the
    rate follows updates, not iterations."""


def span_of_round(
    config: RunConfig,
    rounds: RoundSchedule,
    round: int,
    *,
    cycle: int | None,
    skipped_iterations: Sequence[int] = (),
) -> Span:
    """The schedule that a round follows: the run's, possibly a part of a longer one (--lr-schedule-iters), or under
    --hft-lr-schedule round one of its own, as long as the first round. A last round that is cut short follows the
    beginning of one.

    ``cycle`` is the number of rounds of HiFT's groups, whose rate changes along the run's schedule only when all of
    them have trained once (arXiv 2401.15207); None for other selections. ``skipped_iterations`` (from 1) are those
    that --skip-nonfinite-steps has skipped so far.
    """

    def steps(start: int, stop: int) -> int:
        if config.training.train_samples is None:
            return stop - start
        return rounds.batches.samples_before(stop) - rounds.batches.samples_before(start)

    def updates(start: int, stop: int) -> int:
        left_out = [steps(number - 1, number) for number in skipped_iterations if start < number <= stop]
        return steps(start, stop) - sum(left_out)

    if config.hft.hft_lr_schedule == "round":
        first, (start, _) = rounds.bounds(rounds.first_round), rounds.bounds(round)
        return Span(length=steps(*first), position=partial(updates, start))
    length, before = schedule_length(config), config.optimizer.lr_schedule_start
    if cycle is not None:
        cycle_start, _ = rounds.bounds(round - (round - rounds.first_round) % cycle)
        done = before + updates(0, cycle_start)
        return Span(length=length, position=lambda iteration: done)
    return Span(length=length, position=lambda iteration: before + updates(0, iteration))


class LearningRate:
    """Learning rate and weight decay: warm-up, then --lr-decay-style down to --min-lr at the end of the schedule, or
    after --lr-decay-iters, and weight decay by --weight-decay-incr-style over the whole schedule.

    Holds nothing that a checkpoint would need: the value follows from the position in the schedule alone.
    """

    def __init__(self, optimizer: MegatronOptimizer, options: OptimizerConfig, span: Span, iteration: int) -> None:
        """``iteration`` counts the run's finished iterations; ``span`` gives their positions in the schedule."""
        self._span = span
        self._decoupled: dict[str, float] | None = None
        if options.decoupled_lr is not None:
            least = options.min_lr if options.decoupled_min_lr is None else options.decoupled_min_lr
            self._decoupled = {"max_lr": options.decoupled_lr, "min_lr": least}
        constant_decay = options.weight_decay_incr_style == "constant"
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=options.lr_warmup_init,
            max_lr=options.lr,
            min_lr=options.min_lr,
            lr_warmup_steps=warmup_steps(options, span.length),
            lr_decay_steps=max(decay_steps(options, span.length), 1),
            lr_decay_style=options.lr_decay_style,
            start_wd=options.weight_decay if constant_decay else options.start_weight_decay,
            end_wd=options.weight_decay if constant_decay else options.end_weight_decay,
            wd_incr_steps=span.length,
            wd_incr_style=options.weight_decay_incr_style,
            wsd_decay_steps=wsd_decay_steps(options),
            lr_wsd_decay_style=options.lr_wsd_decay_style,
        )
        self._scheduler.step(increment=span.position(iteration))
        self.last, self.last_decoupled = self._current()
        """Rate of the newest update, or of the coming one before the first; and the rate of embedding and head under
        --decoupled-lr. They are read from the schedule, since a rank may hold neither."""

    def _current(self) -> tuple[float, float | None]:
        rate = float(self._scheduler.get_lr({}))
        return rate, None if self._decoupled is None else float(self._scheduler.get_lr(self._decoupled))

    def advance(self, iteration: int) -> None:
        """Advances by the update of an iteration; ``iteration`` counts those before it."""
        self.last, self.last_decoupled = self._current()
        self._scheduler.step(increment=self._span.position(iteration + 1) - self._span.position(iteration))


def switch_round(
    wrapped: WrappedModel,
    plan: Plan,
    parallel: ParallelConfig,
    options: OptimizerConfig,
    hft: HFTConfig,
    *,
    bf16: bool,
    fp32_gradients: bool,
    group: dist.ProcessGroup,
) -> WrappedModel:
    """Unwraps the model and wraps it for ``plan``; ``wrapped`` is of no use after that.

    ``group`` are the data-parallel ranks; every rank must call it. Moments start at zero (``--hft-moments reset``), or
    are carried over for units that continue to train, and on request for units that become frozen. With reset, bf16
    masters start from the bf16 weights, as in a run started from a checkpoint's weights.
    """
    carries = hft.hft_moments == "carry"
    slots = list(parameter_slots(wrapped.modules))
    carried = CarriedState()
    if carries:
        keeps_frozen = hft.hft_frozen_moments == "host"
        units = wrapped.plan.training if keeps_frozen else wrapped.plan.training & plan.training
        fresh = take_state(wrapped.shards, slots, units, group, continuing=plan.training)
        frozen = wrapped.frozen
        carried = CarriedState(steps=frozen.steps | fresh.steps, tensors=frozen.tensors | fresh.tensors)
    chunks = unwrap(wrapped)
    new = wrap(
        chunks,
        plan,
        parallel,
        options,
        bf16=bf16,
        fp32_gradients=fp32_gradients,
        steps_per_unit=carries,
        traffic=wrapped.traffic,
    )
    give_state(new.shards, slots, carried, group)
    new.frozen.steps, new.frozen.tensors = carried.steps, carried.tensors
    return new
