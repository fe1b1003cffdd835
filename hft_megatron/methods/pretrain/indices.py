"""megatron-core's ``GPTDataset`` with its index of samples kept on disk, under --data-cache-path.

Its own cache writes files one by one, beside files that a killed process has left, and names them by the path of
the corpus and not by its contents.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core import __version__
from megatron.core.datasets.gpt_dataset import GPTDataset

from hft_megatron.data.kept import Arrays, kept_arrays, key_of

_NAMES = ("document_index", "sample_index", "shuffle_index")
"""Names in megatron-core's order."""


def kept_in(folder: Path) -> type[GPTDataset]:
    """The class whose indices are kept in ``folder``: the first process that needs one makes it, and others wait.

    Relies on the method that makes them, the only one that it replaces.
    """

    class KeptGPTDataset(GPTDataset):
        def _build_document_sample_shuffle_indices(self) -> tuple[Any, ...]:
            make = partial(_by_name, super()._build_document_sample_shuffle_indices)
            arrays = kept_arrays(folder, _key(self), make)
            return tuple(arrays[name] for name in _NAMES)

    return KeptGPTDataset


def _by_name(build: Any) -> Arrays:
    return dict(zip(_NAMES, build(), strict=True))


def _key(dataset: Any) -> str:
    """Digest of everything that decides the indices: megatron-core's description of the data set, and the lengths."""
    lengths = np.ascontiguousarray(dataset.dataset.sequence_lengths[dataset.indices])
    documents = hashlib.sha256(lengths.data).hexdigest()
    first = int(dataset.indices[0]) if len(dataset.indices) else 0
    return key_of([__version__, dataset.unique_description, first, documents])
