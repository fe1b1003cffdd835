"""A checkpoint's files and their digests: the list is written last and says that all are there. Imports no torch."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from hft_megatron.config.run_folder import sync, write_atomically

DIGESTS_FILE = "digests.json"


class Digest(TypedDict):
    """What a file must be."""

    sha256: str
    """Hex."""
    bytes: int


def digest_of(path: Path) -> Digest:
    """Reads the whole file; raises OSError."""
    sha256 = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha256.update(block)
            size += len(block)
    return {"sha256": sha256.hexdigest(), "bytes": size}


def write_digests(folder: Path, digests: Mapping[str, Digest]) -> None:
    """Completes the folder: digests that are not known yet are computed, and everything is on the disk afterwards.

    ``digests`` are those of files that their writers have read back already. Raises OSError.
    """
    known = dict(digests)
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            known[path.name] = digest_of(path)
            sync(path)
    write_atomically(folder / DIGESTS_FILE, json.dumps(known, indent=1, sort_keys=True) + "\n")
    sync(folder)


def read_digests(folder: Path) -> dict[str, Digest]:
    """The digests of a complete checkpoint by file name; raises ValueError for a list that can't be read."""
    listed = json.loads((folder / DIGESTS_FILE).read_text(encoding="utf-8"))
    try:
        return {name: Digest(sha256=str(one["sha256"]), bytes=int(one["bytes"])) for name, one in listed.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a list of digests: {error}") from error


def damage_in(folder: Path, digests: Mapping[str, Digest], files: Sequence[str]) -> str | None:
    """What is wrong with the first of ``files`` that is not as it was saved, as the end of a sentence, or None."""
    for name in files:
        path, saved = folder / name, digests.get(name)
        if saved is None:
            return f"{path} is not in {DIGESTS_FILE}"
        try:
            size = path.stat().st_size
            found = digest_of(path)["sha256"] if size == saved["bytes"] else None
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} can't be read ({error.strerror})"
        if found is None:
            return f"{path} has {size} bytes, but {saved['bytes']} were saved"
        if found != saved["sha256"]:
            return f"{path} is not what was saved (sha256 {found[:12]} instead of {saved['sha256'][:12]})"
    return None


def identity_of(folder: Path) -> str:
    """sha256 (hex) that stands for every byte of a complete checkpoint: that of its list."""
    return digest_of(folder / DIGESTS_FILE)["sha256"]


def combined_digest(files: Mapping[str, Digest]) -> str:
    """sha256 (hex) that stands for several files and their names."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
