"""What happens around steps: log lines, validation, checkpoints, and stopping on a signal."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean

import torch
import torch.distributed as dist

from hft_megatron.checkpoint.store import save_checkpoint
from hft_megatron.config.run_folder import same_folder
from hft_megatron.errors import StoppedBySignal
from hft_megatron.hft.audit import Audit
from hft_megatron.model.parameters import parameter_slots
from hft_megatron.parallel import step_clock
from hft_megatron.tracking import tracker as names
from hft_megatron.training.bill import Bill
from hft_megatron.training.hook import Hook
from hft_megatron.training.run import Run
from hft_megatron.training.step import StepResult, validation_loss

SECTION_METRICS = {
    step_clock.FORWARD: names.FORWARD_TIME,
    step_clock.BACKWARD: names.BACKWARD_TIME,
    step_clock.REDUCE_SCATTER_WAIT: names.REDUCE_SCATTER_WAIT,
    step_clock.ALL_GATHER_WAIT: names.ALL_GATHER_WAIT,
    step_clock.OPTIMIZER: names.OPTIMIZER_TIME,
}


@dataclass
class LogSteps(Hook):
    """Records one line every --log-interval steps.

    Loss, times and bytes sent are means over those steps, as in Megatron; all but the loss are the last rank's.
    """

    interval: int
    _pending: list[StepResult] = field(default_factory=list)
    _switch_ms: float | None = None

    def at_round_start(self, run: Run) -> None:
        self._switch_ms = run.switch_ms

    def after_step(self, run: Run, result: StepResult) -> None:
        self._pending.append(result)
        last = run.state.iteration == run.config.training.train_iters
        if run.state.iteration % self.interval == 0 or last:
            run.tracker.log(run.state.iteration, self._record(run, result))
            self._pending.clear()

    def _record(self, run: Run, result: StepResult) -> dict[str, float | int | str]:
        steps = self._pending
        plan, shards = run.wrapped.plan, run.wrapped.shards
        record: dict[str, float | int | str] = {
            names.CONSUMED_SAMPLES: run.state.consumed_samples,
            names.ITERATION_TIME: mean(step.times.total for step in steps),
            names.LEARNING_RATE: run.learning_rate.last,
            names.GLOBAL_BATCH_SIZE: run.batches.share.global_batch_size,
            names.GRAD_NORM: result.grad_norm,
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
        }
        for section, name in SECTION_METRICS.items():
            record[name] = mean(step.times.sections[section] for step in steps)
        losses = [step.loss for step in steps if step.loss is not None]
        if losses:
            record[names.LOSS] = mean(losses)
        if self._switch_ms is not None:
            record[names.ROUND_SWITCH_TIME], self._switch_ms = self._switch_ms, None
        return record


@dataclass
class AuditRounds(Hook):
    """Verifies that resting shards keep their bits: at the end of every round, and every ``interval`` steps."""

    interval: int | None
    _audit: Audit | None = None

    def at_round_start(self, run: Run) -> None:
        self._audit = Audit(list(parameter_slots(run.wrapped.modules)), run.wrapped.plan)

    def after_step(self, run: Run, result: StepResult) -> None:
        if self.interval is not None and run.state.iteration % self.interval == 0:
            self.verify(run)

    def at_round_end(self, run: Run) -> None:
        self.verify(run)
        run.announce(f"audit of round {run.state.round}: every resting shard has the bits it had at its start")

    def verify(self, run: Run) -> None:
        """Raises RunFailed on every rank when a resting shard has changed."""
        assert self._audit is not None
        self._audit.verify(coordinates=run.placement.coordinates)


@dataclass
class Validate(Hook):
    """Records the validation loss every --eval-interval steps and at the end."""

    interval: int | None
    _last: int = -1

    def after_step(self, run: Run, result: StepResult) -> None:
        if self.interval is not None and run.state.iteration % self.interval == 0:
            self._validate(run)

    def at_end(self, run: Run) -> None:
        if self._last != run.state.iteration:
            self._validate(run)

    def _validate(self, run: Run) -> None:
        loss = validation_loss(run)
        if loss is not None:
            run.tracker.log(run.state.iteration, {names.VALIDATION_LOSS: loss})
        self._last = run.state.iteration


@dataclass
class SaveCheckpoints(Hook):
    """Saves every --save-interval steps and at the end."""

    folder: str
    interval: int | None
    last: int | None
    """Iteration of the newest checkpoint in the folder."""
    audit: AuditRounds | None = None
    """Asked before every save: the next run would take what a checkpoint holds for the truth."""

    def after_step(self, run: Run, result: StepResult) -> None:
        if self.interval is not None and run.state.iteration % self.interval == 0:
            self.save(run)

    def at_end(self, run: Run) -> None:
        self.save(run)

    def save(self, run: Run) -> None:
        if self.last == run.state.iteration:
            return
        if self.audit is not None:
            self.audit.verify(run)
        run.announce(f"saving checkpoint at iteration {run.state.iteration:7d} to {self.folder} in torch_dist format")
        save_checkpoint(self.folder, run.wrapped, run.state, run.placement)
        sizes = f"[ t {run.placement.tensor_size}, p {run.placement.pipeline_size} ]"
        run.announce(
            f"  successfully saved checkpoint from iteration {run.state.iteration:7d} to {self.folder} {sizes}"
        )
        self.last = run.state.iteration


class StopOnSignal(Hook):
    """SIGTERM, SIGINT or SIGUSR1: finish the step, save, and end; a second signal ends at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, saver: SaveCheckpoints | None) -> None:
        self._saver = saver
        self._received = 0
        for number in self.SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self._received = number
        for again in self.SIGNALS:
            signal.signal(again, signal.SIG_DFL)

    def after_step(self, run: Run, result: StepResult) -> None:
        # Signals reach ranks at different steps: all stop at the first step where any has one.
        flag = torch.tensor([self._received], device=run.placement.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        number = int(flag.item())
        if number == 0 or run.state.iteration == run.config.training.train_iters:
            return
        stopped = f"{signal.Signals(number).name} stopped the run at iteration {run.state.iteration}"
        if self._saver is None:
            raise StoppedBySignal(f"{stopped}; without --save it is lost")
        self._saver.save(run)
        raise StoppedBySignal(f"{stopped}; start it again with --load {self._saver.folder}")

    def at_end(self, run: Run) -> None:
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_DFL)


def build_hooks(run: Run, *, loaded_iteration: int | None) -> Sequence[Hook]:
    """The hooks that the options ask for, in the order they run."""
    config = run.config
    hooks: list[Hook] = [LogSteps(config.logging.log_interval)]
    audit = AuditRounds(config.hft.hft_audit_interval) if config.hft.hft_audit else None
    if audit is not None:
        hooks.append(audit)
    if run.validation is not None:
        hooks.append(Validate(config.logging.eval_interval))
    saver = None
    if config.checkpoint.save is not None:
        already = loaded_iteration if same_folder(config.checkpoint.save, config.checkpoint.load) else None
        saver = SaveCheckpoints(config.checkpoint.save, config.checkpoint.save_interval, last=already, audit=audit)
        hooks.append(saver)
    hooks.append(Bill(config.checkpoint.save))
    hooks.append(StopOnSignal(saver))
    return hooks
