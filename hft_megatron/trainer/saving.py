"""Checkpoints and exports while a run trains, and its end by a signal or a time limit."""

import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from hft_megatron.checkpoint.folders import newest_in_words
from hft_megatron.checkpoint.writer import CheckpointWriter, SavedCheckpoint
from hft_megatron.config.adapters import Adapters, has_adapter
from hft_megatron.config.checkpoint import CheckpointConfig
from hft_megatron.config.export_folder import ExportFolder
from hft_megatron.config.exports import best_metric, higher_is_better, run_in
from hft_megatron.config.loading import write_resolved
from hft_megatron.config.run_folder import RESOLVED_CONFIG_FILE, RUN_IDENTITY_FILE, SPECTRUM_FILE, write_atomically
from hft_megatron.config.run_identity import RunIdentity
from hft_megatron.config.training import TrainingConfig
from hft_megatron.conversion.export import export_folder
from hft_megatron.conversion.kept_files import Destination, FinalExport, IterationExport, NewFolder
from hft_megatron.conversion.save import Announce, ExportRules
from hft_megatron.errors import RunFailed, Stopped, UserError
from hft_megatron.hft.units import units_of
from hft_megatron.model.llama import LlamaModel
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.parallel.consensus import gathered, on_rank_0
from hft_megatron.parallel.groups import Placement
from hft_megatron.trainer.adapters import save_adapter
from hft_megatron.trainer.inputs import Inputs
from hft_megatron.trainer.loop import Hook
from hft_megatron.trainer.nonfinite import check_weights
from hft_megatron.trainer.run import Run
from hft_megatron.trainer.weight_checks import AuditRounds


@dataclass(frozen=True, kw_only=True)
class Base:
    """Source of the weights that are frozen in a round, so that checkpoints of that round can leave them out."""

    round: int
    iteration: int | None = None
    """A whole checkpoint in the save folder, or one of the run in ``folder``; None is the --load-hf folder."""
    folder: str | None = None
    """Same as ``TrainState.base_folder``."""
    digest: str


@dataclass
class SaveCheckpoints(Hook):
    """Saves every --save-interval steps and at the end."""

    options: CheckpointConfig
    writer: CheckpointWriter
    last: int | None
    """Iteration of the newest checkpoint in the folder."""
    base: Base | None = None
    """Base under --save-trained-only; in a round without one the first checkpoint is whole and becomes the base."""
    audit: AuditRounds | None = None
    """Audit before every save, so that no checkpoint holds damaged weights."""

    def after_iteration(self, run: Run) -> None:
        interval = self.options.save_interval
        if interval is not None and run.state.iteration % interval == 0:
            self.save(run)
        else:
            self._report(run, self.writer.finish(wait=False))

    def at_end(self, run: Run) -> None:
        self.save_and_wait(run)

    def save_and_wait(self, run: Run) -> None:
        """Saves, and returns when the checkpoint is complete, also under --async-save."""
        self.save(run)
        self._report(run, self.writer.finish(wait=True))

    def save(self, run: Run) -> None:
        """Saves unless this iteration is already saved; finishes an earlier save first."""
        self._report(run, self.writer.finish(wait=True))
        if self.last == run.state.iteration:
            return
        if self.audit is not None:
            self.audit.verify(run)
        check_weights(run)
        run.announce(
            f"saving checkpoint at iteration {run.state.iteration:7d} to {self.options.save} in torch_dist format"
        )
        state, left_out, base = run.state, frozenset[str](), self.base
        if self.options.save_trained_only and (base is None or base.round != state.round):
            run.announce(f"  it is whole: the base of later checkpoints of round {state.round} (--save-trained-only)")
        if self.options.save_trained_only and base is not None and base.round == state.round:
            state = replace(state, base_iteration=base.iteration, base_folder=base.folder, base_digest=base.digest)
            left_out = frozenset(unit.name for unit in run.wrapped.plan.units) - run.wrapped.plan.training
        saved = self.writer.save(run.wrapped, state, left_out=left_out)
        self.last = run.state.iteration
        self._report(run, saved)

    def _report(self, run: Run, saved: SavedCheckpoint | None) -> None:
        if saved is None:
            return
        state = saved.state
        run.announce(
            f"  successfully saved checkpoint from iteration {state.iteration:7d} to {self.options.save} "
            f"[ t {state.tensor_model_parallel_size}, p {state.pipeline_model_parallel_size} ]: "
            f"{saved.tensor_bytes / 1e6:,.1f} MB in {saved.total_s * 1e3:,.0f} ms, "
            f"training paused for {saved.stall_s * 1e3:,.0f} ms"
        )
        for path in saved.deleted:
            run.announce(f"  deleted {path}")
        if saved.not_deleted is not None:
            run.announce(f"> older checkpoints could not be deleted: {saved.not_deleted}")
        if state.is_whole and self.options.save_trained_only:
            self.base = Base(round=state.round, iteration=state.iteration, digest=saved.digest)


class Signals:
    """Notes signals between ``listen`` and ``close``; a second one ends the process at once."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    ONE_SIGNAL_S = 1.0
    """Signals this close together count as one: a scheduler signals every process, and torchrun then passes its own
    on."""

    def __init__(self) -> None:
        """Records the current handlers, which ``close`` restores."""
        self.received = 0
        self._before = {number: signal.getsignal(number) for number in self.NUMBERS}
        self._hears: int | None = None

    def listen(self) -> None:
        """Begins to note signals, from the main thread."""
        for number in self._before:
            signal.signal(number, self._receive)
        # A rank that waits in a collective runs no handler; the thread still receives signals.
        heard, self._hears = os.pipe()
        os.set_blocking(self._hears, False)
        self._woken_before = signal.set_wakeup_fd(self._hears)
        # Not a method: a thread that outlives its run must not keep the run's process groups alive.
        threading.Thread(target=_end_at_second_signal, args=(heard, self.ONE_SIGNAL_S), daemon=True).start()

    def _receive(self, number: int, frame: object) -> None:
        self.received = number

    def close(self) -> None:
        """Restores the handlers from the construction; may be called again, and without ``listen``."""
        if self._hears is not None:
            signal.set_wakeup_fd(self._woken_before)
            os.close(self._hears)
            self._hears = None
        for number, handler in self._before.items():
            if signal.getsignal(number) != handler:
                # None is a handler of C code's, which Python cannot set.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


class StopEarly(Hook):
    """A signal, --exit-duration-in-mins or --exit-interval: finish the step, save, and end. In or after the last
    iteration they change nothing.

    Ends the run without saving where a rank cannot write its log.
    """

    def __init__(
        self,
        saver: SaveCheckpoints | None,
        options: TrainingConfig,
        signals: Signals,
        before_stop: Callable[[Run], None] | None = None,
        *,
        of_a_stage: bool = False,
    ) -> None:
        """``before_stop`` is called before the run is ended, and saved."""
        self._of_a_stage = of_a_stage
        self._saver = saver
        self._before_stop = before_stop
        self._minutes = options.exit_duration_in_mins
        self._interval = options.exit_interval
        self._signals = signals

    def after_iteration(self, run: Run) -> None:
        # Signals and clocks reach ranks at different steps: all stop at the first step where any has a reason.
        mine = [self._signals.received, int(self._time_is_up()), int(run.failure is not None)]
        reasons = torch.tensor(mine, device=run.placement.device)
        dist.all_reduce(reasons, op=dist.ReduceOp.MAX)
        number, late, failed = reasons.tolist()
        if failed:
            self._fail_if_any(run)
        due = self._interval is not None and run.state.iteration % self._interval == 0
        if not (number or late or due) or run.is_complete:
            return
        what = f"--exit-duration-in-mins {self._minutes:g}" if late else f"--exit-interval {self._interval}"
        what = signal.Signals(number).name if number else what
        stopped = f"{what} stopped the run at iteration {run.state.iteration}"
        if self._before_stop is not None:
            self._before_stop(run)
        if self._saver is None:
            raise Stopped(f"{stopped}; its training is lost, because --save was not given")
        self._saver.save_and_wait(run)
        again = f"resume it with --load {self._saver.options.save}"
        raise Stopped(f"{stopped}; {'run the same command again to resume it' if self._of_a_stage else again}")

    def _fail_if_any(self, run: Run) -> None:
        failure = next((failure for failure in gathered(run.failure) if failure is not None), None)
        if failure is None:
            return
        if self._saver is not None:
            failure += f"; {newest_in_words(str(self._saver.options.save))}."
        raise RunFailed(failure)

    def _time_is_up(self) -> bool:
        if self._minutes is None:
            return False
        return time.time() - psutil.Process().create_time() >= self._minutes * 60

    def at_end(self, run: Run) -> None:
        self._fail_if_any(run)


def _end_at_second_signal(heard: int, one_signal_s: float) -> None:
    first = None
    while number := os.read(heard, 1):
        first = time.monotonic() if first is None else first
        if time.monotonic() - first >= one_signal_s:
            os._exit(128 + number[0])
    os.close(heard)


def exports_of(options: CheckpointConfig) -> ExportFolder | None:
    """The --save-hf folder of a run that exports during training; None where it exports at the end alone."""
    if options.save_hf is None or options.save_hf_interval is None:
        return None
    metric = best_metric(options)
    return ExportFolder(
        Path(options.save_hf),
        keep=options.save_hf_keep,
        metric=metric,
        higher=metric is not None and higher_is_better(metric),
    )


@dataclass
class Exporter:
    """Exports the model of a run; every rank calls it."""

    options: CheckpointConfig
    inputs: Inputs
    placement: Placement
    announce: Announce
    _said: set[str] = field(default_factory=set)

    def export(self, destination: Destination, chunks: Sequence[LlamaModel], trained: frozenset[str]) -> None:
        """Exports with the newest values of the units ``trained``; RunFailed on all ranks where rank 0 cannot write."""
        asked, adapted = self.options.save_dtype, self.inputs.shape.adapters
        rules = ExportRules(
            source=self.inputs.config.model.load_hf,
            # Also for a run that trains nothing, and merges the adapter that it was given.
            trained=trained if adapted is None else self._matrices_with(adapted),
            adds_template=self.inputs.identity.uses_chat_template or self.inputs.config.data.chat_template is not None,
            save_dtype=None if asked is None else getattr(torch, asked),
            keep_source_tokenizer=self.options.keep_source_tokenizer,
        )
        export_folder(
            destination, chunks, self.inputs.shape, self.placement, rules, self.inputs.tokenizer, self._say_once
        )

    def export_at_end(
        self,
        chunks: Sequence[LlamaModel],
        trained: frozenset[str],
        iteration: int,
        wrapped: WrappedModel | None = None,
    ) -> None:
        """Exports to --save-lora and to --save-hf itself, where they are given; to --save-hf not again when a complete
        run is started again."""
        if self.options.save_lora is not None:
            target = Path(self.options.save_lora)
            save_adapter(target, self.inputs, chunks, iteration, wrapped, self.placement, self.announce)
        if self.options.save_hf is None:
            return
        target = Path(self.options.save_hf)
        if on_rank_0(ExportFolder(target).has_final):  # of this run and iteration: the checks refuse any other
            self.announce(f"> --save-hf {target} already holds the export of iteration {iteration}")
            return
        folder, run = exports_of(self.options), on_rank_0(lambda: run_in(self.options.save))
        destination: Destination = NewFolder(target=target, run=run, iteration=iteration)
        if folder is not None:
            destination = FinalExport(folder=folder, iteration=iteration)
        self.export(destination, chunks, trained)

    def _matrices_with(self, adapters: Adapters) -> frozenset[str]:
        units = units_of(self.inputs.shape.base)
        return frozenset(unit.name for unit in units if has_adapter(unit.name, adapters))

    def _say_once(self, line: str) -> None:
        """Announces a line that every export would repeat, such as one about tokenizer files, only once."""
        if line not in self._said:
            self._said.add(line)
            self.announce(line)


@dataclass
class ExportModels(Hook):
    """Exports every --save-hf-interval steps, with the values of the validation after that step.

    It runs before the checkpoint of the same step, so that a run that resumes from a checkpoint lacks no earlier
    export. Where an export cannot be written the run ends after that checkpoint.
    """

    exporter: Exporter
    folder: ExportFolder
    interval: int
    measured: Callable[[Run], Mapping[str, float]] | None
    """Returns the values of the validation after this step, by name, on every rank, collective; None without one."""
    audit: AuditRounds | None

    def after_iteration(self, run: Run) -> None:
        if run.state.iteration % self.interval:
            return
        if self.audit is not None:
            self.audit.verify(run)
        measured = {} if self.measured is None else self.measured(run)
        destination = IterationExport(folder=self.folder, iteration=run.state.iteration, measured=measured)
        trained = run.rounds.trained_until(run.state.round)
        begun = time.perf_counter()
        try:
            with run.wrapped.gathered_parameters():
                self.exporter.export(destination, run.wrapped.modules, trained)
        except RunFailed as failure:
            run.failure = str(failure)
        run.announce(f"  training paused for {(time.perf_counter() - begun) * 1e3:,.0f} ms")


def write_run_files(inputs: Inputs, scores: dict[str, float] | None, announce: Announce) -> None:
    """Writes the files of --save and --save-hf from before the first step; UserError on all ranks if rank 0 cannot."""

    def write() -> None:
        identity = replace(inputs.identity, run_id=inputs.identity.run_id or secrets.token_hex(8))
        options = inputs.config.checkpoint
        option, target = "--save", options.save
        try:
            if options.save is not None:
                _fill_save_folder(Path(options.save), inputs, identity, scores)
            exports = exports_of(options)
            if exports is not None:
                option, target = "--save-hf", options.save_hf
                for line in exports.begin(identity.run_id, inputs.position.iteration):
                    announce(f"> {line}")
        except OSError as error:
            raise UserError(
                f"{option} {target} cannot be written: {error}; free some space, or choose another folder."
            ) from error

    on_rank_0(write)


def _fill_save_folder(folder: Path, inputs: Inputs, identity: RunIdentity, scores: dict[str, float] | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / RESOLVED_CONFIG_FILE
    # For a complete run the file records the options of its training, whatever this command has.
    if not (inputs.is_over and config.exists()):
        write_resolved(inputs.config, config)
    if scores is not None:
        write_atomically(folder / SPECTRUM_FILE, json.dumps(scores, indent=1) + "\n")
    write_atomically(folder / RUN_IDENTITY_FILE, json.dumps(identity.to_dict(), indent=2) + "\n")
