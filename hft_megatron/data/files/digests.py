"""What a data file is known by."""

import hashlib
from pathlib import Path


def file_digest(path: Path) -> str:
    """sha256 (hex) of the file's bytes, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
