"""Writes safetensors tensor by tensor: every file's header is known before its first byte, so one tensor is in memory.

The format is a length, a JSON header with each tensor's place, and the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from hft_megatron.config.run_folder import sync
from hft_megatron.conversion.weight_files import INDEX_FILE, SINGLE_FILE

MAX_SHARD_BYTES = 5_000_000_000
"""Size of the tensors in one output file; Hugging Face's usual shard size."""

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of data types in a header."""

_ALIGNMENT = 8
"""Alignment of the tensors' bytes, as in the library's own files."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class ShardWriter:
    """The weights of one folder: ``model.safetensors``, or numbered files of ``max_shard_bytes`` and an index.

    A tensor larger than that gets a file of its own. Each tensor is written when it is given and not kept; a file is on
    the disk (fsync) after its last tensor. Not complete before ``close``. Raises OSError where the disk is full.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """``tensors``: name, data type and shape of each, in the order of writing.

        ``metadata`` goes into every file's header.
        """
        self.folder = folder
        self._metadata = {**(metadata or {}), "format": "pt"}
        self._expected = [_Entry(name=name, dtype=dtype, shape=tuple(shape)) for name, dtype, shape in tensors]
        assert len({entry.name for entry in self._expected}) == len(self._expected), "a tensor is named twice"
        self._shards = _split(self._expected, max_shard_bytes)
        self._file: BinaryIO | None = None
        self._places: dict[str, int] = {}
        self._next_shard = 0
        self._written = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes the next tensor, from any device; its name, data type and shape must be those announced."""
        entry = self._expected[self._written]
        given = (name, tensor.dtype, tuple(tensor.shape))
        assert given == (entry.name, entry.dtype, entry.shape), f"{given} instead of {entry}"
        if name not in self._places:
            self._begin_file()
        assert self._file is not None
        self._file.seek(self._places.pop(name))
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._written += 1
        if not self._places:
            self._end_file()

    def close(self) -> None:
        """Writes the index where there is more than one file; every announced tensor must have been written."""
        assert self._written == len(self._expected), f"{self._expected[self._written].name} was not written"
        if not self._shards:
            self._begin_file()
            self._end_file()
        if len(self._shards) > 1:
            weight_map = {
                entry.name: self._file_name(index) for index, shard in enumerate(self._shards) for entry in shard
            }
            total = sum(entry.bytes for entry in self._expected)
            index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            with (self.folder / INDEX_FILE).open("w", encoding="utf-8") as file:
                file.write(index_text + "\n")
                file.flush()
                os.fsync(file.fileno())
        sync(self.folder)

    def _begin_file(self) -> None:
        shard = self._shards[self._next_shard] if self._shards else []
        header, self._places = _header(shard, self._metadata)
        self._file = (self.folder / self._file_name(self._next_shard)).open("wb")
        self._file.write(header)
        self._next_shard += 1

    def _end_file(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None

    def _file_name(self, shard: int) -> str:
        if len(self._shards) <= 1:
            return SINGLE_FILE
        return f"model-{shard + 1:05d}-of-{len(self._shards):05d}.safetensors"


def _split(entries: Sequence[_Entry], max_shard_bytes: int) -> list[list[_Entry]]:
    """Files of consecutive tensors, each of at most ``max_shard_bytes`` or of one tensor."""
    shards: list[list[_Entry]] = []
    size = 0
    for entry in entries:
        if not shards or size + entry.bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    return shards


def _header(shard: Sequence[_Entry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """A file's first bytes, and where in it each tensor begins.

    Tensors lie in the order of writing, wider data types first, so that each begins at a multiple of its element size.
    """
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    ends: dict[str, int] = {}
    offset = 0
    for entry in sorted(shard, key=lambda entry: -entry.dtype.itemsize):
        ends[entry.name] = offset + entry.bytes
        content[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, ends[entry.name]],
        }
        offset = ends[entry.name]
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    places = {entry.name: start + ends[entry.name] - entry.bytes for entry in shard}
    return len(text).to_bytes(8, "little") + text, places
