"""Single weights out of a checkpoint, by one process that builds no model and starts no ranks."""

import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.errors import UserError
from hft_megatron.model.parameter_names import checkpoint_names, whole_shape

_UNREADABLE = (OSError, EOFError, RuntimeError, pickle.UnpicklingError)


class CheckpointTensors:
    """The model's weights in ``SAVE/iter_0000100/``, saved at any layout, by the unit's Hugging Face name.

    The checkpoint's index is a pickle of torch's: read only folders you trust. Raises UserError when the index or a
    file can't be read, or when the weights are not those of ``shape``.
    """

    def __init__(self, path: Path, shape: ModelShape) -> None:
        self._path = path
        self._shape = shape
        self._names = checkpoint_names(shape)
        self._reader = FileSystemReader(path)
        try:
            self._index = self._reader.read_metadata()
        except _UNREADABLE as error:
            raise self._unreadable(error) from error
        self._reader.set_up_storage_reader(self._index, is_coordinator=True)
        for unit in self._names:
            self._check(unit)

    def dtype(self) -> torch.dtype:
        """Data type of the weights, which all have the run's."""
        dtypes = {self._entry(unit).properties.dtype for unit in self._names}
        assert len(dtypes) == 1, f"weights of several data types: {dtypes}"
        return dtypes.pop()

    def read(self, unit: str) -> Tensor:
        """A unit's whole weight in Hugging Face's shape: put together from its shards, without padded vocabulary."""
        entry = self._entry(unit)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        planner = DefaultLoadPlanner()
        planner.set_up_planner({self._names[unit]: tensor}, self._index, is_coordinator=True)
        try:
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except _UNREADABLE as error:
            raise self._unreadable(error) from error
        return tensor[: whole_shape(unit, self._shape)[0]]

    def _entry(self, unit: str) -> TensorStorageMetadata:
        entry = self._index.state_dict_metadata[self._names[unit]]
        assert isinstance(entry, TensorStorageMetadata)
        return entry

    def _check(self, unit: str) -> None:
        name = self._names[unit]
        if name not in self._index.state_dict_metadata:
            raise UserError(f"--load {self._path.parent}: {self._path.name} has no {name}; copy the folder again.")
        (rows, *columns), (saved_rows, *saved_columns) = whole_shape(unit, self._shape), self._entry(unit).size
        is_vocab = rows == self._shape.vocab_size and name.startswith(("embedding.", "output_layer."))
        if columns != saved_columns or not (saved_rows == rows or (is_vocab and saved_rows > rows)):
            raise UserError(
                f"--load {self._path.parent}: {name} in {self._path.name} has shape {list(self._entry(unit).size)}, "
                f"and the run's model has {[rows, *columns]}; copy the folder again."
            )

    def _unreadable(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return UserError(
            f"--load {self._path.parent}: {self._path.name} can't be read ({reason}); "
            "copy the folder again, or choose another --iteration."
        )
