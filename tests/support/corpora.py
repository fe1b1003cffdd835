"""Token files as megatron-core writes them, of documents that a tiny LLaMA learns something from."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

VOCAB_SIZE = 335
"""The vocabulary of ``tests.support.runs.make_inputs``."""
END = 332
"""The end token of its tokenizer."""


def write_corpus(prefix: Path, documents: Iterable[Sequence[int]], dtype: type[np.number] = np.uint16) -> str:
    """Writes PREFIX.bin and PREFIX.idx, one sequence per document; returns the prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def random_documents(count: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    """Documents of 3 to 60 tokens, each of which names the next; the last is END."""
    rng = np.random.default_rng(seed)
    successor = 3 + np.random.default_rng(0).permutation(vocab_size - 3)  # one task, whatever the seed of the documents
    documents = []
    for _ in range(count):
        document = [int(rng.integers(3, vocab_size))]
        for _ in range(int(rng.integers(1, 58))):
            document.append(int(successor[document[-1] - 3]))
        documents.append([*document, END])
    return documents
