"""Targets of an export, and the files that it keeps of its source folder.

Licences, model cards, further chat templates and other small files belong to the model, whatever was trained.
"""

import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from hft_megatron.config.export_folder import EXPORTS_FILE, FINAL, UNFINISHED, ExportFolder
from hft_megatron.conversion.weight_files import INDEX_FILE


@dataclass(frozen=True, kw_only=True)
class IterationExport:
    """Target of the export of an iteration."""

    folder: ExportFolder
    iteration: int
    measured: Mapping[str, float]
    """Validation metrics of that iteration, by name."""

    @property
    def target(self) -> Path:
        return self.folder.place(self.iteration)

    def open(self) -> Path:
        return self.folder.open(self.target.name)

    def publish(self, unfinished: Path) -> list[str]:
        return self.folder.publish(unfinished, self.iteration, self.measured)


@dataclass(frozen=True, kw_only=True)
class FinalExport:
    """Target of the export at the end of such a run: beside those of its iterations."""

    folder: ExportFolder
    iteration: int

    @property
    def target(self) -> Path:
        return self.folder.path

    def open(self) -> Path:
        return self.folder.open(FINAL)

    def publish(self, unfinished: Path) -> list[str]:
        self.folder.publish_final(unfinished, self.iteration)
        return []


@dataclass(frozen=True, kw_only=True)
class NewFolder:
    """Target of a single export, in a folder that appears with it."""

    target: Path
    run: str | None = None
    """``RunIdentity.run_id`` of a run that may be started again, for ``exports.json``; None for other commands."""
    iteration: int = 0

    def open(self) -> Path:
        unfinished = self.target.with_name(UNFINISHED.format(self.target.name))
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        return unfinished

    def publish(self, unfinished: Path) -> list[str]:
        if self.run is not None:
            ExportFolder(unfinished).note_only_final(self.run, self.iteration)
        os.replace(unfinished, self.target)
        return []


Destination = NewFolder | IterationExport | FinalExport
"""``target`` is its name in the log; ``open`` gives an empty folder to write into, and ``publish`` moves it there when
it is complete and returns lines for the log."""


LARGEST_BYTES = 10_000_000
"""Limit for a file or folder that is kept: more than licences, cards and their pictures have, and less than weights."""
_TOO_LARGE = f"above {LARGEST_BYTES / 1e6:g} MB"
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|ggml|npz|npy|pkl|distcp|mlmodel|tflite|ot)(\.index\.json)?"
)
_OF_A_TRAINING = re.compile(
    r"original|runs|wandb|checkpoint[-_]\d+|iter_\d+|global_step_?\d+"  # folders
    r"|trainer_state\.json|training_args\.(bin|json|yaml)|(all|train|eval|test|predict)_results\.json"  # transformers
    r"|generated_predictions\.(txt|jsonl?)|trainer_log\.jsonl|training_(eval_)?loss\.png|events\.out\.tfevents\..*"
    r"|adapter_config\.json"  # PEFT; transformers would look for the adapter in the export
    r"|latest|zero_to_fp32\.py|latest_checkpointed_iteration\.txt"  # DeepSpeed and Megatron
)
"""Names of files left by another training run, or by the release of the weights in another form."""
_RECORDS = (EXPORTS_FILE, "half_reset.json", "average.json", "fapm.json", "dare.json", "ties.json")
"""Records that this package writes about weights which the export no longer has."""
_SHOWN = 12


def keep_files(source: Path, target: Path, *, others: Collection[str] = ()) -> list[str]:
    """Copies files that ``target`` lacks from ``source``. Returns a line that names them and those left out.

    ``others``, which somebody else writes, and the safetensors that the export replaces are skipped without mention.
    Left out are weights, files above ``LARGEST_BYTES``, hidden ones, checkpoints, ``original/``, records of a training
    run and what cannot be read. Raises OSError where ``target`` cannot be written.
    """
    kept: list[str] = []
    left_out: list[str] = []
    for path in sorted(source.iterdir()):
        name = path.name
        if name in others or (target / name).exists() or name == INDEX_FILE or name.endswith(".safetensors"):
            continue
        reason = _reason_against(path)
        if reason is None:
            _copy(path, target / name)
            kept.append(f"{name}/" if path.is_dir() else name)
        else:
            left_out.append(f"{name} ({reason})")
    said = [
        f"{what}: {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"
        for what, names in (("also copied", kept), ("left out", left_out))
        if names
    ]
    return [f"export: from {source}, {'; '.join(said)}"] if said else []


def _reason_against(path: Path) -> str | None:
    """The reason not to copy a file or folder of the source; None where it is copied."""
    if path.name.startswith("."):
        return "hidden"
    if _OF_A_TRAINING.fullmatch(path.name) or path.name in _RECORDS:
        return "specific to the source"
    try:
        if path.is_dir():
            if path.is_symlink():
                return "a link to a folder"
            inner = (_reason_against(each) for each in sorted(path.iterdir()))
            refused = next((f"a folder with {reason}" for reason in inner if reason is not None), None)
            total = sum(each.stat().st_size for each in path.rglob("*"))
            return refused or (_TOO_LARGE if total > LARGEST_BYTES else None)
        if not path.is_file():
            return "not a file"
        if _WEIGHTS.fullmatch(path.name):
            return "weights"
        if path.stat().st_size > LARGEST_BYTES:
            return _TOO_LARGE
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        return str(error.strerror)
    return None


def _copy(path: Path, target: Path) -> None:
    """Copies contents alone: the mode of a file in a store that others share is not the export's."""
    if path.is_dir():
        shutil.copytree(path, target, copy_function=shutil.copyfile)
    else:
        shutil.copyfile(path, target)
