"""Profiles a few iterations: a trace of each rank by torch's profiler, or ranges that nsys captures."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.autograd.profiler import emit_nvtx
from torch.profiler import ProfilerActivity, profile, record_function

from hft_megatron.config.run import RunConfig
from hft_megatron.errors import UserError
from hft_megatron.parallel.launch import numbers_in_words
from hft_megatron.trainer.loop import Hook
from hft_megatron.trainer.run import Run

FOLDER = "torch_profile"
"""Folder for traces, inside --save or --tensorboard-dir."""


def trace_folder(config: RunConfig) -> Path | None:
    """Folder for the traces; None where nsys keeps the profile, or nothing is profiled.

    UserError without CUDA for nsys to capture and without a folder for traces instead.
    """
    options = config.logging
    if not options.profile or (torch.cuda.is_available() and not options.use_pytorch_profiler):
        return None
    parent = config.checkpoint.save or options.tensorboard_dir
    if parent is None:
        raise UserError(
            "--profile without CUDA uses torch's profiler, which needs a folder for its traces; give --save or "
            "--tensorboard-dir."
        )
    return Path(parent) / FOLDER


@dataclass
class Profile(Hook):
    """Profiles the iterations of this process after --profile-step-start up to --profile-step-end.

    In a trace each is a range ``iteration 11``, with its hooks; the sections of its step are ranges within it. A run
    that ends or is stopped before the last one still writes a trace.
    """

    before_first: int
    """The iteration after which profiling begins."""
    last: int
    ranks: tuple[int, ...]
    folder: Path | None
    """Folder for traces; None leaves them to nsys."""
    _running: ExitStack | None = None
    _iteration: ExitStack = field(default_factory=ExitStack)
    _begun: int = 0

    def at_round_start(self, run: Run) -> None:
        if self._running is None and self.before_first <= run.state.iteration < self.last:
            self._start(run)

    def after_iteration(self, run: Run) -> None:
        if self._running is None and run.state.iteration == self.before_first:
            self._start(run)
        elif self._running is not None and run.state.iteration == self.last:
            self._stop(run)
        elif self._running is not None:
            self._iteration.close()
            self._begin_iteration(run)

    def at_end(self, run: Run) -> None:
        if self._running is not None:
            self._stop(run)

    def _start(self, run: Run) -> None:
        if run.is_complete:
            return
        self._running, self._begun = ExitStack(), run.state.iteration
        where = "for nsys" if self.folder is None else f"for traces in {self.folder}"
        run.announce(
            f"> profiling iterations {self._begun + 1} to {min(self.last, run.length)} of "
            f"{numbers_in_words(list(self.ranks))} {where}"
        )
        if run.placement.rank in self.ranks:
            run.wrapped.traffic.clock.annotates = True
            self._running.enter_context(_captured_by_nsys() if self.folder is None else self._traced(run))
            self._begin_iteration(run)

    def _begin_iteration(self, run: Run) -> None:
        if run.placement.rank in self.ranks and not run.is_complete:
            self._iteration.enter_context(record_function(f"iteration {run.state.iteration + 1}"))

    def _stop(self, run: Run) -> None:
        assert self._running is not None
        self._iteration.close()
        try:
            self._running.close()
        except (OSError, RuntimeError) as error:  # the second is torch's
            run.failure = f"the trace of rank {run.placement.rank} cannot be written to {self.folder}: {error}"
        run.wrapped.traffic.clock.annotates = False
        self._running = None
        if self.folder is not None:
            run.announce(f"> profiles written to {self.folder}/{self._name(run, '*')} (open them with Perfetto)")

    def _name(self, run: Run, rank: int | str) -> str:
        return f"iterations-{self._begun + 1}-{run.state.iteration}.rank-{rank}.json.gz"

    @contextmanager
    def _traced(self, run: Run) -> Iterator[None]:
        assert self.folder is not None
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        with profile(activities=activities, record_shapes=True) as profiler:
            yield
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / self._name(run, run.placement.rank)))


@contextmanager
def _captured_by_nsys() -> Iterator[None]:
    """Within it, ``nsys profile --capture-range=cudaProfilerApi`` captures, with torch's operators as ranges."""
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaProfilerStart())
    with emit_nvtx(record_shapes=True):
        yield
    torch.cuda.check_error(runtime.cudaProfilerStop())
