"""The --save-hf folder of a run: its export at the end and, of a run that exports while it trains, a folder for each
iteration, and which is the best.

Only rank 0 writes here. Every folder is written under a hidden name and renamed when it is complete. Imports no torch.
"""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hft_megatron.config.model_shape import HF_CONFIG_FILE
from hft_megatron.config.run_folder import sync, write_atomically
from hft_megatron.errors import UserError

EXPORTS_FILE = "exports.json"
"""Records the run that wrote the exports, the validation at each, and the best one under transformers' names."""
UNFINISHED = ".{}.unfinished"
"""Hidden name of an export that is being written or deleted, or was when its run died."""
FINAL = "final"
"""Name of the export at the end of a run, for ``open``."""


@dataclass(kw_only=True)
class Noted:
    """Contents of ``exports.json``."""

    run: str
    """``RunIdentity.run_id`` of the run that writes here."""
    metric_for_best_model: str | None = None
    """Metric of --save-hf-best. This name and the next three are those of transformers' trainer."""
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    """Name of the folder."""
    exports: dict[str, dict[str, float]] = field(default_factory=dict)
    """Folder -> values of the validation at its iteration, by name."""
    final_iteration: int | None = None
    """Iteration of the export at the end of the run, once it is complete or was being moved here."""
    final_files: tuple[str, ...] = ()


class ExportFolder:
    """The folder of one run. Methods that change something raise OSError."""

    def __init__(self, path: Path, *, keep: int | None = None, metric: str | None = None, higher: bool = False) -> None:
        """``keep`` is --save-hf-keep, ``metric`` that of --save-hf-best, of which ``higher`` values are better."""
        self.path = path
        self._keep, self._metric, self._higher = keep, metric, higher

    def noted(self) -> Noted | None:
        """The contents of ``exports.json``; None where there is none. UserError for one that cannot be read."""
        file = self.path / EXPORTS_FILE
        if not file.exists():
            return None
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            return Noted(**{**saved, "final_files": tuple(saved["final_files"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--save-hf {self.path}: {file.name} cannot be read ({error}); choose a new folder."
            ) from error

    def has_final(self) -> bool:
        """Return whether the complete export at the end of a run is here."""
        return (self.path / HF_CONFIG_FILE).exists()

    def strangers(self) -> list[str]:
        """Names of files and folders here that no exporting run writes, sorted."""
        noted = self.noted()
        own = {EXPORTS_FILE, *(() if noted is None else noted.final_files)}
        return sorted(
            path.name
            for path in self.path.iterdir()
            if path.name not in own and not _is_iteration(path) and not _is_unfinished(path)
        )

    def iteration_folders(self) -> Iterator[Path]:
        """Folders of complete exports, also of those that are not noted."""
        return (path for path in self.path.iterdir() if _is_iteration(path))

    def begin(self, run: str, iteration: int) -> list[str]:
        """Makes the folder ready for a run that resumes after ``iteration``; returns lines for the log.

        Removes what a killed run had not finished. Exports of later iterations stay until the run comes to them again,
        and are not noted until then.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        noted = self.noted() or Noted(run=run)
        for path in [path for path in self.path.iterdir() if _is_unfinished(path)]:
            # What was on its way out is in nobody's way where it cannot be deleted.
            shutil.rmtree(path, ignore_errors=_is_old(path))
        if noted.final_files and not self.has_final():
            for name in noted.final_files:
                _remove(self.path / name)
            noted.final_iteration, noted.final_files = None, ()
        later = {path.name for path in self.iteration_folders() if _iteration_of(path) > iteration}
        noted.run = run
        noted.exports = {
            name: measured
            for name, measured in noted.exports.items()
            if name not in later and (self.path / name).is_dir()
        }
        self._write(noted)
        return [f"{self.path / name} will be overwritten at its iteration" for name in sorted(later)]

    def place(self, iteration: int) -> Path:
        """The folder of an iteration's export, which has the name of a checkpoint's."""
        return self.path / f"iter_{iteration:07d}"

    def open(self, name: str) -> Path:
        """An empty folder to write the export ``name`` into."""
        unfinished = self.path / UNFINISHED.format(name)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        return unfinished

    def publish(self, unfinished: Path, iteration: int, measured: Mapping[str, float]) -> list[str]:
        """Gives a complete export its name, notes it, and deletes what --save-hf-keep drops; returns lines for the log.

        An older export that cannot be deleted is a line of the log, not an error.
        """
        path = self.place(iteration)
        noted = self._noted_here()
        failures: list[str | None] = []
        if path.exists():
            noted.exports.pop(path.name, None)
            self._write(noted)
            failures.append(self._delete(path))
        unfinished.rename(path)
        sync(self.path)
        best = noted.best_model_checkpoint
        # What is no number would make JSON that strict readers refuse, and is never the best.
        noted.exports[path.name] = {name: value for name, value in measured.items() if math.isfinite(value)}
        self._write(noted)
        lines = []
        if noted.best_model_checkpoint != best:
            lines.append(f"  it is the best so far: {self._metric} {noted.best_metric:.6g}")
        for gone in self._superseded(noted, iteration):
            failure = self._delete(gone)
            failures.append(failure)
            if not gone.exists():
                noted.exports.pop(gone.name, None)
            if failure is None:
                lines.append(f"  deleted {gone}")
        self._write(noted)
        reasons = "; ".join(failure for failure in failures if failure is not None)
        return [*lines, f"> older exports could not be deleted: {reasons}"] if reasons else lines

    def note_only_final(self, run: str, iteration: int) -> None:
        """Notes that the files here are the export at the end of ``run``, which makes no others."""
        files = tuple(sorted(path.name for path in self.path.iterdir()))
        self._write(Noted(run=run, final_iteration=iteration, final_files=files))

    def publish_final(self, unfinished: Path, iteration: int) -> None:
        """Moves the export at the end of the run into the folder itself, config.json last: without it nothing loads."""
        noted = self._noted_here()
        names = sorted((path.name for path in unfinished.iterdir()), key=lambda name: (name == HF_CONFIG_FILE, name))
        noted.final_iteration, noted.final_files = iteration, tuple(names)
        self._write(noted)
        for name in names:
            (unfinished / name).rename(self.path / name)
        unfinished.rmdir()
        sync(self.path)

    def _noted_here(self) -> Noted:
        noted = self.noted()
        assert noted is not None, "begin writes it"
        return noted

    def _write(self, noted: Noted) -> None:
        sign = -1 if self._higher else 1
        ranked = sorted(
            (sign * measured[self._metric], _iteration_of(self.path / name), name)
            for name, measured in noted.exports.items()
            if self._metric in measured
        )
        value, step, name = ranked[0] if ranked else (None, None, None)
        noted.metric_for_best_model = self._metric
        noted.best_metric = None if value is None else sign * value
        noted.best_global_step, noted.best_model_checkpoint = step, name
        write_atomically(self.path / EXPORTS_FILE, json.dumps(asdict(noted), indent=1) + "\n")

    def _superseded(self, noted: Noted, iteration: int) -> list[Path]:
        if self._keep is None:
            return []
        until_here = sorted(
            (path for path in self.iteration_folders() if _iteration_of(path) <= iteration), key=_iteration_of
        )
        return [path for path in until_here[: -self._keep] if path.name != noted.best_model_checkpoint]

    def _delete(self, path: Path) -> str | None:
        """Deletes a folder so that whoever looks meanwhile, or after a crash, sees a whole export or none.

        Returns why some of it is left, hidden or in its place; None where all is gone.
        """
        try:
            # A name of its own: of the last one so deleted something may be left, such as NFS's open files.
            dying = tempfile.mkdtemp(prefix=f".{path.name}.old.", suffix=".unfinished", dir=self.path)
            path.rename(dying)
            shutil.rmtree(dying)
        except OSError as error:
            return str(error)
        return None


def _is_iteration(path: Path) -> bool:
    return re.fullmatch(r"iter_\d{7,}", path.name) is not None and path.is_dir()


def _is_unfinished(path: Path) -> bool:
    return re.fullmatch(r"\.(iter_\d{7,}|final)\.unfinished", path.name) is not None or _is_old(path)


def _is_old(path: Path) -> bool:
    return re.fullmatch(r"\.iter_\d{7,}\.old(\.\w+)?\.unfinished", path.name) is not None


def _iteration_of(path: Path) -> int:
    return int(path.name.removeprefix("iter_"))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
