"""Hooks around steps: log lines and validation, and the list of all hooks of a run."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import mean, median

import torch
import torch.distributed as dist

from hft_megatron.checkpoint.writer import CheckpointWriter
from hft_megatron.config.run_folder import same_folder
from hft_megatron.config.tracking import LoggingConfig
from hft_megatron.costs.flops import StepFlops
from hft_megatron.parallel import step_clock
from hft_megatron.parallel.consensus import gathered
from hft_megatron.parallel.groups import host_name
from hft_megatron.tracking import tracker as names
from hft_megatron.tracking.tracker import Tracker
from hft_megatron.trainer.bill import Bill, TimeLeft, Work, flops_of, peak_memory, rates, work_of
from hft_megatron.trainer.loop import Hook
from hft_megatron.trainer.profiling import Profile, trace_folder
from hft_megatron.trainer.run import Run
from hft_megatron.trainer.saving import Base, Exporter, ExportModels, SaveCheckpoints, Signals, StopEarly, exports_of
from hft_megatron.trainer.step import StepResult
from hft_megatron.trainer.validation import validate
from hft_megatron.trainer.weight_checks import AuditRounds, CheckReplicas, params_norm

WINDOW = 100
"""Finished iterations that a loss is compared with; a resumed run collects them afresh."""
FEWEST = 20
"""Fewest iterations to compare with: losses fall fast at the start, and a median of a few says little."""
SIGMAS_PER_DEVIATION = 1.4826
"""Standard deviation over median absolute deviation of a normal distribution (Hampel 1974)."""


@dataclass
class LossSpikes:
    """Finds spikes by the robust z-score, |loss - median| / (1.4826 x median absolute deviation)."""

    threshold: float | None
    """Smallest score of a spike; None finds none."""
    _recent: "deque[float]" = field(default_factory=lambda: deque(maxlen=WINDOW))

    def score(self, loss: float) -> float | None:
        """The z-score of an iteration's loss where it is a spike, else None; adds the loss to the window.

        Also None where the window has no spread, and for a loss that is not finite, which is not added.
        """
        if self.threshold is None or not isfinite(loss):
            return None
        before = tuple(self._recent)
        self._recent.append(loss)
        if len(before) < FEWEST:
            return None
        middle = median(before)
        spread = SIGMAS_PER_DEVIATION * median(abs(one - middle) for one in before)
        score = abs(loss - middle) / spread if spread > 0 else 0.0
        return score if score > self.threshold else None


NAMED_FROM = 1.3
"""Ratio to the median of all ranks from which the slowest rank is named."""


@dataclass
class ComputeTimes:
    """Adds up this rank's compute times from one record to the next."""

    _milliseconds: float = 0.0
    _steps: int = 0
    _places: list[str] = field(default_factory=list)

    def add(self, result: StepResult) -> None:
        """Adds a finished step."""
        self._milliseconds += result.times.compute
        self._steps += 1

    def take(self, run: Run) -> dict[str, float | str]:
        """Median and worst time of all ranks per step since the last call, and the slowest rank, by their names in the
        log; empty for a run of one rank, or where no step was added. Collective: 8 bytes of every rank."""
        placement = run.placement
        if self._steps == 0:
            return {}
        mean, self._milliseconds, self._steps = self._milliseconds / self._steps, 0.0, 0
        if placement.world_size == 1:
            return {}
        if not self._places:
            self._places = gathered(f"rank {placement.rank} on {host_name()} ({placement.coordinates})")
        times = torch.zeros(placement.world_size, dtype=torch.float64, device=placement.device)
        times[placement.rank] = mean
        dist.all_reduce(times)
        return in_words(times.tolist(), self._places)


def in_words(times: list[float], places: list[str]) -> dict[str, float | str]:
    """Milliseconds and place of every rank -> entries of the log."""
    middle, worst = median(times), max(times)
    found: dict[str, float | str] = {names.COMPUTE_TIME_MEDIAN: middle, names.COMPUTE_TIME_WORST: worst}
    if worst >= NAMED_FROM * middle > 0:
        found[names.SLOWEST_RANK] = f"{places[times.index(worst)]}, {worst / middle:.2f} x the median compute time"
    return found


def over_all_ranks(times: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Times of this rank in milliseconds, by their names in the log -> the smallest and the largest of all ranks.
    Collective: 16 bytes for each."""
    mine = torch.tensor(list(times.values()), dtype=torch.float64, device=device)
    # The largest of the negatives is the smallest: one collective for both.
    both = torch.stack([-mine, mine])
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    lowest, highest = (-both[0]).tolist(), both[1].tolist()
    return {
        names.over_ranks(name, which): value
        for which, values in ((names.FASTEST, lowest), (names.SLOWEST, highest))
        for name, value in zip(times, values, strict=True)
    }


SECTION_METRICS = {
    step_clock.FORWARD: names.FORWARD_TIME,
    step_clock.BACKWARD: names.BACKWARD_TIME,
    step_clock.REDUCE_SCATTER_WAIT: names.REDUCE_SCATTER_WAIT,
    step_clock.ALL_GATHER_WAIT: names.ALL_GATHER_WAIT,
    step_clock.OPTIMIZER: names.OPTIMIZER_TIME,
}
TIMED_AT = {
    0: (),
    1: (step_clock.REDUCE_SCATTER_WAIT, step_clock.ALL_GATHER_WAIT, step_clock.OPTIMIZER),
    2: step_clock.SECTIONS,
}
"""Sections whose times are gathered over ranks, by --timing-log-level."""


@dataclass
class LogSteps(Hook):
    """Records one line every ``interval`` steps.

    Measures of the objective, times, rates and bytes sent are means over those steps, as in Megatron; times, bytes and
    sizes are the last rank's. Skipped steps have times and bytes, but no loss or norm. A spike of the loss is recorded
    at once, without the values that ranks would have to gather.
    """

    interval: int
    options: LoggingConfig
    spikes: LossSpikes
    counts_skipped: bool
    tracker: Tracker
    _pending: list[StepResult] = field(default_factory=list)
    _since_gathered: list[StepResult] = field(default_factory=list)
    _gathered: dict[str, float | int | str] = field(default_factory=dict)
    """Values that wait for a record: there is none where all steps after a spike were skipped."""
    _gradients_are_there: bool = False
    _work: list[Work] = field(default_factory=list)
    _compute: ComputeTimes = field(default_factory=ComputeTimes)
    _time_left: TimeLeft = field(default_factory=TimeLeft)
    _flops: StepFlops = field(init=False)
    _switch_ms: float | None = None
    _spike: float | None = None
    """Score of the newest step's loss, where it is a spike."""

    def at_round_start(self, run: Run) -> None:
        self._switch_ms = run.switch_ms
        self._gradients_are_there = False
        self._flops = flops_of(run)

    def after_step(self, run: Run, result: StepResult) -> None:
        self._pending.append(result)
        self._since_gathered.append(result)
        self._gradients_are_there = result.updated
        self._work.append(work_of(result, self._flops))
        self._time_left.add(result, run)
        self._compute.add(result)
        self._spike = None if result.loss is None else self.spikes.score(result.loss)

    def after_iteration(self, run: Run) -> None:
        due = run.state.iteration % self.interval == 0 or run.is_complete
        # On all ranks: a spike is seen by the last stage alone, so its record cannot include a collective.
        if due:
            self._gathered |= self._gather(run)
        spike, self._spike = self._spike, None
        # Where every iteration since the last record was skipped there is nothing to record.
        if self._pending and (due or spike is not None):
            record = {**self._record(run), **self._gathered}
            self._gathered = {}
            run.log(record if spike is None else {**record, names.LOSS_SPIKE: spike}, self.tracker)
            self._pending.clear()
            self._work.clear()

    def _gather(self, run: Run) -> dict[str, float | int | str]:
        """Values that all ranks measure together; collective."""
        found: dict[str, float | int | str] = {**self._compute.take(run)}
        # Not the pending steps, which are fewer on the rank that has logged a spike.
        steps, self._since_gathered = self._since_gathered, []
        if not steps:
            return found
        if sections := TIMED_AT[self.options.timing_log_level]:
            times = {SECTION_METRICS[one]: mean(step.times.sections[one] for step in steps) for one in sections}
            found |= over_all_ranks(times, run.placement.device)
        # Gradients stay in memory until the next step, or round, begins.
        if self.options.log_num_zeros_in_grad and self._gradients_are_there:
            found[names.NUM_ZEROS] = int(run.wrapped.optimizer.count_zeros())
        if self.options.log_params_norm:
            found[names.PARAMS_NORM] = params_norm(run)
        return found

    def _record(self, run: Run) -> dict[str, float | int | str]:
        steps, updates = self._pending, [step for step in self._pending if step.updated]
        plan, shards = run.wrapped.plan, run.wrapped.shards
        record: dict[str, float | int | str] = {
            names.CONSUMED_SAMPLES: run.state.consumed_samples,
            names.ITERATION_TIME: mean(step.times.total for step in steps),
            names.LEARNING_RATE: run.learning_rate.last,
            names.GLOBAL_BATCH_SIZE: run.rounds.schedule.batches.of(run.state.iteration - 1),
            names.ROUND: run.state.round,
            names.TRAINABLE_PARAMETERS: plan.trainable_parameters,
            names.FROZEN_PARAMETERS: plan.frozen_parameters,
            names.PLAN_DIGEST: plan.short_digest,
            names.REDUCE_SCATTER_BYTES: mean(step.reduce_scatter_bytes for step in steps),
            names.ALL_GATHER_BYTES: mean(step.all_gather_bytes for step in steps),
            names.GRADIENT_BYTES: shards.gradient_bytes,
            names.MASTER_BYTES: shards.master_bytes,
            names.MOMENT_BYTES: shards.moment_bytes,
            names.OPTIMIZER_BYTES: shards.master_bytes + shards.moment_bytes,
            names.TIME_LEFT: self._time_left.seconds(run),
            **rates(self._work, run.placement.world_size),
            **peak_memory(),
        }
        if run.learning_rate.last_decoupled is not None:
            record[names.DECOUPLED_LEARNING_RATE] = run.learning_rate.last_decoupled
        for section, name in SECTION_METRICS.items():
            record[name] = mean(step.times.sections[section] for step in steps)
        if run.reference is not None:
            record[names.REFERENCE_BYTES] = run.reference.held_bytes
        if self.counts_skipped:
            record[names.SKIPPED_ITERATIONS] = len(steps) - len(updates)
            losses = [step.loss for step in steps if not step.updated and step.loss is not None]
            record[names.NAN_ITERATIONS] = sum(not isfinite(loss) for loss in losses)
        if updates:
            record[names.GRAD_NORM] = updates[-1].grad_norm
            for name in updates[-1].measured:
                record[name] = mean(step.measured[name] for step in updates)
        if self._switch_ms is not None:
            record[names.ROUND_SWITCH_TIME], self._switch_ms = self._switch_ms, None
        return record


@dataclass
class Validate(Hook):
    """Records validations every --eval-interval steps and at the end, and with --eval-on-start before the first
    step."""

    interval: int | None
    on_start: bool
    _last: int = -1
    _measured: dict[str, float] = field(default_factory=dict)

    def measured_after_step(self, run: Run) -> dict[str, float]:
        """Values measured after this step on all validation data, by name, on every rank; empty without a validation.
        Collective."""
        if self._last != run.state.iteration:
            return {}
        measured = [self._measured]
        # The last rank is of the last pipeline stage, where losses are.
        dist.broadcast_object_list(measured, src=run.placement.world_size - 1)
        return measured[0]

    def at_round_start(self, run: Run) -> None:
        if self.on_start and run.state.iteration == 0:
            self._validate(run)

    def after_iteration(self, run: Run) -> None:
        if self.interval is not None and run.state.iteration % self.interval == 0:
            self._validate(run)

    def at_end(self, run: Run) -> None:
        if self._last != run.state.iteration:
            self._validate(run)

    def _validate(self, run: Run) -> None:
        measured = validate(run)
        self._measured = measured.together
        if metrics := measured.metrics():
            run.log(metrics)
        self._last = run.state.iteration


def _logging_hooks(run: Run) -> list[LogSteps]:
    """One hook for everything, or a second one for dashboards where they have an interval of their own."""
    options, counts_skipped = run.config.logging, run.config.training.skip_nonfinite_steps > 0
    dashboards = options.tensorboard_log_interval or options.log_interval
    parts: list[tuple[int, Tracker]] = [(options.log_interval, run.tracker)]
    if dashboards != options.log_interval:
        parts = [
            (options.log_interval, run.tracker.part(dashboards=False)),
            (dashboards, run.tracker.part(dashboards=True)),
        ]
    return [
        LogSteps(interval, options, LossSpikes(options.loss_spike_threshold), counts_skipped, tracker)
        for interval, tracker in parts
    ]


def build_hooks(
    run: Run,
    *,
    own: Sequence[Hook] = (),
    after_saving: Sequence[Hook] = (),
    loaded_iteration: int | None,
    base: Base | None,
    exporter: Exporter,
    signals: Signals,
    of_a_stage: bool = False,
) -> Sequence[Hook]:
    """The hooks of the options, in the order they run, with a user's ``own`` before any that save, and
    ``after_saving`` last: these include evaluations, so that a failing one costs no checkpoint.

    ``loaded_iteration`` is that of the checkpoint the run resumes from, ``base`` the first base of --save-trained-only;
    ``exporter`` writes under --save-hf-interval. ``of_a_stage``: the run ends with a line instead of the whole bill.
    """
    config = run.config
    hooks: list[Hook] = [*_logging_hooks(run)]
    if isinstance(run.reference, Hook):
        hooks.append(run.reference)
    audit = AuditRounds(config.hft.hft_audit_interval) if config.hft.hft_audit else None
    if audit is not None:
        hooks.append(audit)
    hooks.append(CheckReplicas(config.training.check_replicas_interval))
    measured = None
    if run.validation:
        validation = Validate(config.logging.eval_interval, config.logging.eval_on_start)
        measured = validation.measured_after_step
        hooks.append(validation)
    hooks += own
    folder, interval = exports_of(config.checkpoint), config.checkpoint.save_hf_interval
    if folder is not None and interval is not None:
        hooks.append(ExportModels(exporter, folder, interval, measured, audit))
    saver = None
    if config.checkpoint.save is not None:
        already = loaded_iteration if same_folder(config.checkpoint.save, config.checkpoint.load) else None
        writer = CheckpointWriter(config.checkpoint, run.placement)
        saver = SaveCheckpoints(config.checkpoint, writer, last=already, base=base, audit=audit)
        hooks.append(saver)
    hooks.append(Bill(config.checkpoint.save, of_a_stage=of_a_stage))
    before_stop = None
    if config.logging.profile:
        options = config.logging
        ranks = options.profile_ranks or (0,)
        profile = Profile(options.profile_step_start, options.profile_step_end, ranks, trace_folder(config))
        before_stop = profile.at_end
        hooks.append(profile)
    hooks.append(StopEarly(saver, config.training, signals, before_stop, of_a_stage=of_a_stage))
    return [*hooks, *after_saving]
