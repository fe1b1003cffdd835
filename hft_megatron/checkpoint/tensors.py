"""Reads single weights of a checkpoint in one process, without a model and without ranks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from hft_megatron.checkpoint.folders import DIGESTS_FILE, Digest, chain_of, damage_in, read_digests
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.errors import UserError
from hft_megatron.model.parameter_names import checkpoint_names, whole_shape


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """One checkpoint folder, opened."""

    path: Path
    reader: FileSystemReader
    index: Metadata


class CheckpointTensors:
    """The model's weights in ``SAVE/iter_0000100/``, saved at any layout, by the unit's Hugging Face name.

    Weights that were left out (--save-trained-only) are read from its bases. The digest of every file is checked before
    it is read. The index is a pickle of torch's: read only folders you trust. Raises UserError for a folder that is not
    as it was saved.
    """

    def __init__(self, path: Path, shape: ModelShape, *, option: str = "--load") -> None:
        """``option`` names the run in errors."""
        self._shape = shape
        self._names = checkpoint_names(shape)
        self._folder_of: dict[str, _Folder] = {}
        for at, state in chain_of(path, option=option):
            self._open(at)
            assert not state.is_whole or not self.left_out, f"{at} lacks {self.left_out[:3]}"

    @property
    def left_out(self) -> list[str]:
        """Units whose weights are in no checkpoint but in the run's --load-hf folder."""
        return [unit for unit in self._names if unit not in self._folder_of]

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights, which is the run's."""
        dtypes = {self._entry(unit).properties.dtype for unit in self._folder_of}
        assert len(dtypes) == 1, f"weights of several data types: {dtypes}"
        return dtypes.pop()

    def read(self, unit: str) -> Tensor:
        """A unit's whole weight in Hugging Face's shape: assembled from its shards, without padded vocabulary."""
        folder, entry = self._folder_of[unit], self._entry(unit)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        planner = DefaultLoadPlanner()
        planner.set_up_planner({self._names[unit]: tensor}, folder.index, is_coordinator=True)
        folder.reader.read_data(planner.create_local_plan(), planner).wait()
        return tensor[: whole_shape(unit, self._shape)[0]]

    @contextmanager
    def on(self, source: str | None) -> Iterator[Callable[[str], Tensor]]:
        """Yields a function that reads any unit's weight as the run has it: from its checkpoints, or if they leave it
        out, rounded from ``source``, the Hugging Face folder of ``SavedRun.source``."""
        if not self.left_out:
            yield self.read
            return
        assert source is not None, "SavedRun.source refuses it"
        left_out = frozenset(self.left_out)
        with HuggingFaceWeights(source) as weights:

            def read(unit: str) -> Tensor:
                if unit in left_out:
                    return weights.read(f"{unit}.weight").to(self.dtype)
                return self.read(unit)

            yield read

    def _entry(self, unit: str) -> TensorStorageMetadata:
        entry = self._folder_of[unit].index.state_dict_metadata[self._names[unit]]
        assert isinstance(entry, TensorStorageMetadata)
        return entry

    def _open(self, path: Path) -> None:
        """Adds the weights that the folders before lack, after verification."""
        # The index is a pickle: its digest is checked before it is opened.
        digests = _digests(path)
        _verify(path, digests, (name for name in digests if not name.endswith(".distcp")))
        reader = FileSystemReader(path)
        folder = _Folder(path=path, reader=reader, index=reader.read_metadata())
        reader.set_up_storage_reader(folder.index, is_coordinator=True)
        found = {
            unit: name
            for unit, name in self._names.items()
            if unit not in self._folder_of and name in folder.index.state_dict_metadata
        }
        self._folder_of |= dict.fromkeys(found, folder)
        names = set(found.values())
        places = folder.index.storage_data.items()
        _verify(path, digests, {place.relative_path for at, place in places if at.fqn in names})


def _digests(path: Path) -> dict[str, Digest]:
    try:
        return read_digests(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--load {path.parent}: {path.name}/{DIGESTS_FILE} cannot be read ({error}); choose another --iteration."
        ) from error


def _verify(path: Path, digests: Mapping[str, Digest], files: Iterable[str]) -> None:
    damage = damage_in(path, digests, sorted(files))
    if damage is not None:
        raise UserError(f"--load {path.parent}: {damage}; choose another --iteration, or copy the folder again.")
