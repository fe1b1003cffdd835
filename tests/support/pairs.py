"""A base model and a tuned one as Hugging Face folders, differing in every entry, for tests that merge them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.models import make_llama


def make_pair(folder: Path, variant: str = "gqa", dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Writes ``folder/base`` and ``folder/tuned`` without tokenizers, as one file each."""
    base = make_llama(folder / "base", variant, dtype, **overrides)
    tuned = folder / "tuned"
    tuned.mkdir()
    for file in base.glob("*.json"):
        (tuned / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(1)
    moved = {
        # Away from zero, so that no entry is rounded back to the base's.
        name: (tensor.float() * (1.25 + torch.rand(tensor.shape, generator=generator))).to(dtype)
        for name, tensor in read_weights(base).items()
    }
    save_file(moved, tuned / "model.safetensors", metadata={"format": "pt"})
    return folder


def change_config(folder: Path, **values: Any) -> None:
    """Sets keys of ``folder/config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, single or sharded, in memory."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """True if two tensors have the same data type, shape and bits; signed zeros differ."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
