"""The weight files of a Hugging Face folder, or why they are not clear. Reads names and the index only.

transformers takes model.safetensors where it is there, else the files that the index names, and looks at no other. A
second whole set beside the one it takes may be the one that was meant, so two sets are an error. Imports no torch.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hft_megatron.config.hf_keys import note_unknown_keys
from hft_megatron.config.model_shape import HF_CONFIG_FILE, load_hf_config
from hft_megatron.errors import UserError


def notes_on_folder(folder: str) -> list[str]:
    """Returns a line for each key and file that was ignored and might have meant something.

    Says nothing about an unclear set of weight files, which ``check_weights`` refuses.
    """
    notes = note_unknown_keys(load_hf_config(folder), f"{folder}/{HF_CONFIG_FILE}")
    with suppress(UserError):
        notes += find_weight_files(Path(folder), option="--load-hf").notes
    return notes


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
"""Endings of weight files that are pickles, which can run code when they are opened, or of other programs."""


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The single set of weight files of a folder."""

    files: tuple[str, ...]
    """Names in the folder, sorted; all are there."""
    index: Mapping[str, str]
    """The tensors' files by the index; empty where no index was needed."""
    notes: tuple[str, ...] = ()
    """A line for each ignored file that might have been meant as weights."""


@dataclass(frozen=True, kw_only=True)
class _ShardSet:
    """Files that are numbered out of one total."""

    total: int
    present: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        return not self.missing


def find_weight_files(folder: Path, *, option: str) -> WeightFiles:
    """Finds the set of safetensors that transformers would read; ``option`` names the folder in errors.

    Raises UserError where there is none, a file of it is missing, its index cannot be read, or a second set exists.
    """
    where = f"{option} {folder}"
    present = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    sets = _shard_sets(present)
    index = _read_index(folder / INDEX_FILE, where)
    if index is None and SINGLE_FILE not in present:
        raise UserError(f"{where}: {_why_nothing_can_be_read(folder, present, sets)}")
    indexed = tuple(sorted(set(index.values()))) if index is not None else ()
    chosen: tuple[str, ...] = (SINGLE_FILE,)
    notes = []
    if SINGLE_FILE in present and indexed != (SINGLE_FILE,):
        if any(file in present for file in indexed):
            raise UserError(_two_sets(where, (SINGLE_FILE,), f"the files that {INDEX_FILE} names ({_span(indexed)})"))
        if index is not None:
            notes.append(f"not read, because its files are missing: {INDEX_FILE}")
            index = None
    else:
        missing = [file for file in indexed if file not in present]
        if missing:
            raise UserError(
                f"{where}: {INDEX_FILE} names {_listed(missing)}, and {_is_missing(missing)}; copy the model folder "
                "again."
            )
        chosen = indexed
    for other in sets:
        left = [file for file in other.present if file not in chosen]
        if left and other.is_whole:
            raise UserError(_two_sets(where, chosen, f"the set {_span(other.present)}"))
        if left:
            notes.append(f"not read, because {_span(chosen)} holds the weights: {_listed(left)}")
    return WeightFiles(files=chosen, index=index or {}, notes=tuple(f"{folder}: {note}" for note in notes))


def _shard_sets(present: Sequence[str]) -> list[_ShardSet]:
    found: dict[int, dict[int, str]] = {}
    for file in present:
        match = _SHARD.fullmatch(file)
        if match is not None:
            found.setdefault(int(match[2]), {})[int(match[1])] = file
    return [
        _ShardSet(
            total=total,
            present=tuple(numbered.values()),
            missing=tuple(
                f"model-{number:05d}-of-{total:05d}.safetensors"
                for number in range(1, total + 1)
                if number not in numbered
            ),
        )
        for total, numbered in sorted(found.items())
    ]


def _read_index(path: Path, where: str) -> dict[str, str] | None:
    """Maps every tensor to its file; None where there is no index."""
    if not path.exists():
        return None
    try:
        weight_map = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("weight_map must name a file for every tensor")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: {INDEX_FILE} cannot be read ({error}); copy the model folder again.") from error
    return weight_map


def _why_nothing_can_be_read(folder: Path, present: Sequence[str], sets: Sequence[_ShardSet]) -> str:
    if len(sets) > 1:
        spans = " and ".join(_span(each.present) for each in sets)
        return f"there are shards of {len(sets)} sets ({spans}) but no {INDEX_FILE}; keep one set, with its index."
    if sets and sets[0].is_whole:
        # Not read without it: a folder that was copied in part may lack more, and no other program would load it.
        return (
            f"all {sets[0].total} shards ({_span(sets[0].present)}) are there, but {INDEX_FILE}, which says what is in "
            "them, is missing; copy it from the original model folder."
        )
    if sets:
        missing = sets[0].missing
        return f"{_listed(missing)} and {INDEX_FILE} are missing; copy the model folder again."
    others = [*present, *sorted(path.name for path in folder.glob("*") if path.suffix in _OTHER_FORMATS)]
    found = f" (found: {others[0]}, which is never opened)" if others else ""
    return (
        f"neither {SINGLE_FILE} nor {INDEX_FILE} is there{found}; only safetensors under these names are read, so "
        "convert other weight files with transformers' save_pretrained first."
    )


def _two_sets(where: str, first: Sequence[str], second: str) -> str:
    return (
        f"{where}: both {_span(first)} and {second} exist, but only one of them can be the model; remove the other "
        f"(transformers would read {_span(first)})."
    )


def _span(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} to {files[-1]}"


def _listed(files: Sequence[str]) -> str:
    shown = ", ".join(files[:3])
    return shown if len(files) <= 3 else f"{shown} and {len(files) - 3} more"


def _is_missing(files: Sequence[str]) -> str:
    return "it is missing" if len(files) == 1 else "they are missing"
