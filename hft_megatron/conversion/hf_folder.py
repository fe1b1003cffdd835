"""Reads the weights of a Hugging Face folder, tensor by tensor and slice by slice. Never unpickles."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hft_megatron.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
"""Endings of weight files that are pickles, which can run code when they are opened, or of other programs."""
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class HuggingFaceWeights:
    """The safetensors of one folder, single or sharded. Use as a context manager.

    Raises UserError when the folder has no safetensors, its index names a missing file, a file can't be read, or a
    tensor is absent, quantised or of another shape than the model's.
    """

    def __init__(self, folder: str, *, option: str = "--load-hf") -> None:
        """``option`` names the folder in sentences."""
        self.folder = Path(folder)
        self.option = option
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()
        self._file_of = self._read_index()

    def __enter__(self) -> "HuggingFaceWeights":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._files.clear()

    def _read_index(self) -> dict[str, str]:
        index = self.folder / INDEX_FILE
        if index.exists():
            try:
                weight_map = dict[str, str](json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.option} {self.folder}: {INDEX_FILE} can't be read ({error}); copy the model folder again."
                ) from error
            return weight_map
        if not (self.folder / SINGLE_FILE).exists():
            others = sorted(path.name for path in self.folder.glob("*") if path.suffix in _OTHER_FORMATS)
            found = f" (found: {others[0]}, which is never opened)" if others else ""
            raise UserError(
                f"{self.option} {self.folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there{found}; "
                "only safetensors are read, so convert other weight files with transformers' save_pretrained first."
            )
        return dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{self.option} {self.folder}: {file} can't be read ({error}); copy the model folder again."
                ) from error
        return self._files[file]

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise UserError(f"{self.option} {self.folder}: the tensor {name} is missing, but config.json asks for it.")
        return self._open(self._file_of[name]).get_slice(name)

    def files(self) -> list[Path]:
        """The files that the tensors are in, sorted; others in the folder are not looked at."""
        return [self.folder / file for file in sorted(set(self._file_of.values()))]

    def names(self) -> list[str]:
        """Every tensor of the folder, sorted."""
        return sorted(self._file_of)

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor as stored."""
        stored = self._slice(name).get_dtype()
        if stored not in _DTYPES:
            raise UserError(
                f"{self.option} {self.folder}: {name} is stored as {stored}, but only F32, F16 and BF16 are read; "
                "dequantise the model first."
            )
        return _DTYPES[stored]

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises UserError unless the stored tensor has this shape."""
        stored = tuple(self._slice(name).get_shape())
        if stored != shape:
            raise UserError(
                f"{self.option} {self.folder}: {name} has shape {list(stored)}, but config.json asks for {list(shape)}."
            )

    def read(self, name: str, *, dim: int | None = None, start: int = 0, length: int = 0) -> Tensor:
        """The whole tensor, or ``length`` entries from ``start`` along ``dim`` (0 or 1); only those bytes are read."""
        self.dtype(name)
        stored = self._slice(name)
        part = slice(start, start + length)
        tensor: Tensor = stored[:] if dim is None else stored[part] if dim == 0 else stored[:, part]
        return tensor
