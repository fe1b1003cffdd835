"""Log-probabilities of a reference model on disk: one safetensors file for each model, data set and dtype."""

import hashlib
import json
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hft_megatron.config.run_folder import sync
from hft_megatron.errors import UserError

_TENSOR = "log_probs"
_NOTE = "hft_megatron"
"""The one entry of the file's metadata: safetensors writes several in any order."""


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What the numbers depend on."""

    model: str
    """Digest of the reference's weights."""
    data: str
    """Digest of the pairs: files, tokenizer, template and rules."""
    dtype: str
    """Of the weights, such as ``torch.float32``."""
    arithmetic: str
    """What else decides the numbers: layout, packing and engine in bf16; empty in fp32, where that is rounding."""
    pairs: int

    def file_name(self, *, part: bool) -> str:
        """``part``: of a pass that has not come to its end, which another run goes on with."""
        words = json.dumps(asdict(self), sort_keys=True)
        return f"{hashlib.sha256(words.encode()).hexdigest()[:24]}{'.part' if part else ''}.safetensors"


def read_cache(folder: Path, key: CacheKey, *, part: bool) -> Tensor | str | None:
    """The log-probabilities, (pairs, 2) fp64; what is wrong with the file, where it is damaged; None without one.

    With ``part`` those of the pairs that a pass had come to, and NaN for the others.
    Raises UserError for a file that is of another model or other data than its name says.
    """
    path = folder / key.file_name(part=part)
    try:
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            metadata, log_probs = file.metadata() or {}, file.get_tensor(_TENSOR)
            assert isinstance(log_probs, Tensor)
        note = json.loads(metadata[_NOTE])
        saved, damaged = dict(note["key"]), _sha256(log_probs) != note["sha256"]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        return f"{path} can't be read ({' '.join(str(error).split())})"
    if damaged:
        return f"{path} is damaged: its contents are not what was written"
    for name, value in asdict(key).items():
        if saved.get(name) != value:
            raise UserError(
                f"--dpo-reference-cache {folder}: {path.name} was made for the {name} {_short(saved.get(name))}, and "
                f"this run's is {_short(value)}; delete the file, which has been renamed or copied over another."
            )
    return log_probs


def check_cache_can_be_written(folder: Path) -> None:
    """Makes the folder and a file in it, which goes again: a pass over all data must not be lost. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


def write_cache(folder: Path, key: CacheKey, log_probs: Tensor, *, part: bool) -> Path:
    """Writes (pairs, 2) fp64 so that a crash leaves nothing torn; the whole replaces the part. Raises OSError."""
    note = json.dumps({"key": asdict(key), "sha256": _sha256(log_probs)})
    path = folder / key.file_name(part=part)
    folder.mkdir(parents=True, exist_ok=True)
    # Not the number of the process: in containers that share the folder they are alike.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(save({_TENSOR: log_probs.contiguous()}, {_NOTE: note}))
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if not part:
        (folder / key.file_name(part=True)).unlink(missing_ok=True)
    return path


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) else value
