"""Where an export goes, and what it keeps of its source folder.

Licences, model cards, further chat templates and small files of any other kind are a model's, whatever was trained.
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
    """Where the export of an iteration goes."""

    folder: ExportFolder
    iteration: int
    measured: Mapping[str, float]
    """What validation measured there, by name."""

    @property
    def target(self) -> Path:
        return self.folder.place(self.iteration)

    def open(self) -> Path:
        return self.folder.open(self.target.name)

    def publish(self, unfinished: Path) -> list[str]:
        return self.folder.publish(unfinished, self.iteration, self.measured)


@dataclass(frozen=True, kw_only=True)
class FinalExport:
    """Where the export at the end of such a run goes: beside those of its iterations."""

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
    """An export alone, in a folder that appears with it."""

    target: Path

    def open(self) -> Path:
        unfinished = self.target.with_name(UNFINISHED.format(self.target.name))
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        return unfinished

    def publish(self, unfinished: Path) -> list[str]:
        os.replace(unfinished, self.target)
        return []


Destination = NewFolder | IterationExport | FinalExport
"""``target`` is what the log calls it; ``open`` gives an empty folder to write into, and ``publish`` puts it there when
it is complete and returns lines for the log."""


LARGEST_BYTES = 10_000_000
"""Of a file or folder that is kept: more than licences, cards and their pictures have, and less than weights."""
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
"""Names of what another training, or the release of the weights in another form, left."""
_RECORDS = (EXPORTS_FILE, "half_reset.json", "average.json", "fapm.json", "dare.json", "ties.json")
"""What this package writes about weights that the export has no more."""
_SHOWN = 12


def keep_files(source: Path, target: Path, *, others: Collection[str] = ()) -> list[str]:
    """Copies what ``target`` lacks of ``source``, and returns a line that names it and what else was left out.

    Not looked at are ``others``, which somebody else writes, and the safetensors that the export replaces. Left out are
    weights, files above ``LARGEST_BYTES``, hidden ones, checkpoints, ``original/``, records of a training and what
    can't be read. Raises OSError where ``target`` can't be written.
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
        for what, names in (("also taken over", kept), ("left out", left_out))
        if names
    ]
    return [f"export: of {source}, {'; '.join(said)}"] if said else []


def _reason_against(path: Path) -> str | None:
    """Why a file or folder of the source is not taken over, as a clause; None where it is."""
    if path.name.startswith("."):
        return "hidden"
    if _OF_A_TRAINING.fullmatch(path.name) or path.name in _RECORDS:
        return "of the source's own making"
    try:
        if path.is_dir():
            if path.is_symlink():
                return "a link to a folder"
            inner = (_reason_against(each) for each in sorted(path.iterdir()))
            refused = next((f"a folder with {reason}" for reason in inner if reason is not None), None)
            total = sum(each.stat().st_size for each in path.rglob("*"))
            return refused or (_TOO_LARGE if total > LARGEST_BYTES else None)
        if not path.is_file():
            return "no file"
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
    """Contents alone: the mode of a file in a store that others share is not the export's."""
    if path.is_dir():
        shutil.copytree(path, target, copy_function=shutil.copyfile)
    else:
        shutil.copyfile(path, target)
