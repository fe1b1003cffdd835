"""The trackers of a run: metrics.jsonl, TensorBoard and wandb, and the choice among them by its options."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from hft_megatron.config.tracking import LoggingConfig
from hft_megatron.errors import RunFailed, UserError
from hft_megatron.tracking.console import ConsoleTracker
from hft_megatron.tracking.tracker import FILE_NAME, ITERATION, CompositeTracker, Metrics, Tracker, dashboard_metrics


class JsonlTracker:
    """Appends each record as one object; floats are written so that they read back bit for bit.

    An undefined loss is written as ``NaN``, which Python reads back but strict JSON does not know.
    """

    is_dashboard: ClassVar[bool] = False

    def __init__(self, path: Path, *, kept_until: float) -> None:
        """Open ``path`` for a run that resumes after the iteration ``kept_until``: 0 for a fresh run, or -1 if that
        validates before its first step; infinite for a command that is no run.

        Lines of later iterations are dropped first: the run that wrote them died before its next checkpoint, and
        repeats them. Raises ``UserError`` naming the line when the file is not in this format, and where it cannot be
        written.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _drop_lines_after(path, kept_until)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error}; free some space, or choose another --save folder."
            ) from error

    def log(self, step: int, metrics: Metrics) -> None:
        """Append one line and hand it to the operating system, so that a killed run loses nothing.

        Raises RunFailed, on this rank alone, where it cannot be written.
        """
        assert ITERATION not in metrics, "the iteration is the step, not a metric"
        try:
            self._file.write(json.dumps({ITERATION: step, **metrics}) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunFailed(f"iteration {step} cannot be written to {self._path}: {error}") from error

    def close(self) -> None:
        """Close the file; ``log`` has already reported failed writes."""
        with contextlib.suppress(OSError):
            self._file.close()


def _drop_lines_after(path: Path, iteration: float) -> None:
    """Keep the lines up to ``iteration``; replace the file in one step, so that a kill here loses nothing.

    It is left alone where all lines are kept: another process may still be writing.
    """
    found = lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines = lines[:-1]  # a run was killed while it wrote
    kept = [line for number, line in enumerate(lines, 1) if _iteration_of(line, f"{path}:{number}") <= iteration]
    if kept == found:
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _iteration_of(line: str, where: str) -> int:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); move the file away or choose another --save.") from error
    if not isinstance(record, dict) or not isinstance(record.get(ITERATION), int):
        raise UserError(f"{where} has no whole number `{ITERATION}`; move the file away or choose another --save.")
    return int(record[ITERATION])


class TensorBoardTracker:
    """Writes every number of a record as a scalar; text (the plan digest) has no curve and is left out."""

    is_dashboard: ClassVar[bool] = True

    def __init__(self, folder: str, *, kept_until: float) -> None:
        """Write event files into ``folder``; a run that resumes after ``kept_until`` hides the events of iterations
        that it repeats."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only on demand

        purge_step = int(kept_until) + 1 if 0 < kept_until < math.inf else None
        self._writer = SummaryWriter(log_dir=folder, purge_step=purge_step)

    def log(self, step: int, metrics: Metrics) -> None:
        """Write one scalar per number."""
        for name, value in dashboard_metrics(metrics).items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbTracker:
    """One wandb run. It gets the resolved options and the records; no source, no diff, no terminal output."""

    is_dashboard: ClassVar[bool] = True

    def __init__(self, *, project: str, name: str | None, folder: str | None, config: Mapping[str, Any]) -> None:
        """Start a run of ``project``; its files go to ``folder``/wandb (./wandb when None).

        Raises ``UserError`` when wandb refuses: online without a login or a connection.
        """
        import wandb  # starts threads on import: only on demand

        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        # Left on, wandb uploads a git diff of the working tree and copies of the terminal, which may hold secrets.
        settings = wandb.Settings(console="off", disable_git=True, save_code=False)
        try:
            self._run = wandb.init(project=project, name=name, dir=folder, config=dict(config), settings=settings)
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"--wandb-project {project}: wandb did not start ({reason}); "
                "run `wandb login`, or set WANDB_MODE=offline."
            ) from error

    def log(self, step: int, metrics: Metrics) -> None:
        """Add the record to the run's history at ``step``."""
        self._run.log(dashboard_metrics(metrics), step=step)

    def close(self) -> None:
        """Finish the run; online, wait until it is uploaded."""
        self._run.finish()


def check_tracking_packages(logging: LoggingConfig) -> None:
    """Raise ``UserError`` when an option needs a package that is not installed; the same on every rank."""
    for option, value, package in (
        ("--tensorboard-dir", logging.tensorboard_dir, "tensorboard"),
        ("--wandb-project", logging.wandb_project, "wandb"),
    ):
        if value is not None and find_spec(package) is None:
            raise UserError(f"{option} {value} needs the package {package}; run `pip install {package}`.")


def build_tracker(
    logging: LoggingConfig,
    *,
    save: str | None,
    train_iters: int,
    start_iteration: int,
    kept_until: float,
    resolved_config: Mapping[str, Any],
    is_writer: bool,
) -> CompositeTracker:
    """The trackers of this rank: on the writing rank the console, metrics.jsonl (with --save) and those of the options.

    ``start_iteration`` is the last iteration of the loaded checkpoint, 0 for a fresh run; ``kept_until`` is the last
    one whose records are kept (infinite: all). ``resolved_config`` are the run's options for wandb; it must hold
    options only, nothing from the environment. Raises ``UserError`` on every rank when a package is missing.
    """
    check_tracking_packages(logging)
    if not is_writer:
        return CompositeTracker()
    trackers: list[Tracker] = []
    if save is not None:
        trackers.append(JsonlTracker(Path(save) / FILE_NAME, kept_until=kept_until))
    if logging.tensorboard_dir is not None:
        trackers.append(TensorBoardTracker(logging.tensorboard_dir, kept_until=kept_until))
    if logging.wandb_project is not None:
        trackers.append(
            WandbTracker(
                project=logging.wandb_project, name=logging.wandb_exp_name, folder=save, config=resolved_config
            )
        )
    # Last, so that no bar is on the screen when another tracker fails.
    trackers.append(ConsoleTracker(train_iters=train_iters, start_iteration=start_iteration))
    return CompositeTracker(trackers=tuple(trackers))
