"""Digest of a file's bytes, by which plans, data, weights and checkpoints are known again."""

import hashlib
from pathlib import Path


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file of any size, read piece by piece. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
