"""Reads the weights of a Hugging Face folder, tensor by tensor and slice by slice. Never unpickles."""

import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hft_megatron.conversion.weight_files import INDEX_FILE, find_weight_files
from hft_megatron.errors import UserError
from hft_megatron.hft.units import EMBEDDING_NAME, LM_HEAD_NAME

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_LAYER = re.compile(r"\.\d+\.")
"""The part of a tensor's name that gives its layer."""


class HuggingFaceWeights:
    """The safetensors of one folder, single or sharded. Use as a context manager.

    Raises UserError when the folder's weight files are not one clear set (``find_weight_files``), a file cannot be
    read, two files hold one tensor, the index contradicts the files, or when a tensor that is asked for is absent,
    quantized, of another shape than the model's, or has a value that is not finite.
    """

    def __init__(self, folder: str, *, option: str = "--load-hf") -> None:
        """``option`` names the folder in error messages."""
        self.folder = Path(folder)
        self.option = option
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()
        found = find_weight_files(self.folder, option=option)
        with ExitStack() as unless_all_is_well:
            unless_all_is_well.callback(self._stack.close)
            self._file_of = self._read_headers(found.files)
            self._check_index(found.index)
            unless_all_is_well.pop_all()

    def __enter__(self) -> "HuggingFaceWeights":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._files.clear()

    def _read_headers(self, files: tuple[str, ...]) -> dict[str, str]:
        """Maps every tensor to its file, according to the files themselves."""
        file_of: dict[str, str] = {}
        for file in files:
            names = self._open(file).keys()
            for name in names:
                if name in file_of:
                    raise UserError(
                        f"{self.option} {self.folder}: {name} is in {file_of[name]} and in {file}; these files are of "
                        "two exports, so copy the model folder again."
                    )
                file_of[name] = file
        return file_of

    def _check_index(self, index: Mapping[str, str]) -> None:
        for name, file in index.items():
            held_by = self._file_of.get(name)
            if held_by != file:
                found = "is in no file" if held_by is None else f"is in {held_by}"
                raise UserError(
                    f"{self.option} {self.folder}: {INDEX_FILE} says that {name} is in {file}, but it {found}; the "
                    "index is of another export, so copy the model folder again."
                )

    def check_one_export(self) -> None:
        """Raises UserError where matrices of one kind have another data type in another file.

        Within a file, an export may have chosen that; between files it shows a shard left over from another export.
        """
        first_of: dict[str, str] = {}
        for name in self.names():
            first = first_of.setdefault(_LAYER.sub(".*.", name), name)
            if self._file_of[first] != self._file_of[name] and self._stored_dtype(first) != self._stored_dtype(name):
                described = [f"{each} is {self._stored_dtype(each)} in {self._file_of[each]}" for each in (first, name)]
                raise UserError(
                    f"{self.option} {self.folder}: {described[0]}, but {described[1]}; these files are of two exports, "
                    "so copy the model folder again."
                )

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{self.option} {self.folder}: {file} cannot be read ({error}); copy the model folder again."
                ) from error
        return self._files[file]

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise UserError(
                f"{self.option} {self.folder}: the tensor {name} is missing, but config.json asks for "
                f"it{self._fix_of_missing(name)}."
            )
        return self._open(self._file_of[name]).get_slice(name)

    def _fix_of_missing(self, name: str) -> str:
        head, embedding = f"{LM_HEAD_NAME}.weight", f"{EMBEDDING_NAME}.weight"
        if name == head:
            return "; set tie_word_embeddings to true if the head is the embedding"
        if name == embedding and head in self._file_of:
            return f"; if {head}, which is there, is the tied matrix, store it as {embedding}"
        return ""

    def _stored_dtype(self, name: str) -> str:
        return str(self._slice(name).get_dtype())

    def files(self) -> list[Path]:
        """The files that hold the tensors, sorted; others in the folder are not looked at."""
        return [self.folder / file for file in sorted(set(self._file_of.values()))]

    def file(self, name: str) -> str:
        """The file that holds a tensor."""
        return self._file_of[name]

    def names(self) -> list[str]:
        """The names of all tensors in the folder, sorted."""
        return sorted(self._file_of)

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor as stored."""
        stored = self._stored_dtype(name)
        if stored not in _DTYPES:
            raise UserError(
                f"{self.option} {self.folder}: {name} is stored as {stored}, but only F32, F16 and BF16 are read; "
                "dequantize the model first."
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
        """The whole tensor, or ``length`` entries from ``start`` along ``dim`` (0 or 1); only those bytes are read.

        Raises UserError with tensor, file and position of a value among them that is not finite.
        """
        self.dtype(name)
        stored = self._slice(name)
        part = slice(start, start + length)
        tensor: Tensor = stored[:] if dim is None else stored[part] if dim == 0 else stored[:, part]
        self._check_finite(name, tensor, first={} if dim is None else {dim: start})
        return tensor

    def _check_finite(self, name: str, tensor: Tensor, *, first: Mapping[int, int]) -> None:
        """``first`` is where ``tensor`` begins in the whole one, by dimension; 0 for dimensions it doesn't name."""
        # One pass as fast as a copy: 0.1 s for 537 MB on one core. NaN is both the smallest and the largest.
        smallest, largest = torch.aminmax(tensor)
        if math.isfinite(smallest) and math.isfinite(largest):
            return
        place = torch.isfinite(tensor).logical_not_().nonzero()[0].tolist()
        whole_place = [index + first.get(dim, 0) for dim, index in enumerate(place)]
        raise UserError(
            f"{self.option} {self.folder}: {name} in {self._file_of[name]} has the value {tensor[tuple(place)].item()} "
            f"at {whole_place}, which would make every loss not finite; use an intact copy of the model."
        )
