"""Arrays that are kept on disk between starts, in folders of entries that several processes use at once.

An entry is named by a digest of everything that decides it, so it is never out of date, and deleting it costs only
time. It is written whole or not at all, and a damaged one is not read.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from hft_megatron.errors import UserError

ACCOUNT = "account.json"
"""File of an entry that lists its contents."""
_UNUSED_S = 30 * 24 * 3600
"""Seconds without a use after which an entry is removed."""
Arrays = dict[str, NDArray[Any]]
"""Arrays by name."""


def folder_for_entries(folder: Path, option: str) -> Path:
    """The folder, created if missing. Raises UserError, naming the ``option``, where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {folder} cannot be used: {error.strerror}; name a writable folder.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{option} {folder} cannot be used: it cannot be written; name another folder.")
    return folder


def key_of(decisive: object) -> str:
    """The name of the entry that ``decisive`` (JSON) decides."""
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def kept_arrays(folder: Path, key: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of an entry, made by ``make`` in one process while others wait; mapped where they could be written,
    else in memory."""
    entry, made = folder / key, None
    if (found := read_entry(entry)) is not None:
        return found[0]
    with one_at_a_time(folder / f"{key}.lock"):
        if read_entry(entry) is None:
            made = make()
            with suppress(OSError):  # A full disk costs the next process only its time.
                remove_unused(folder)
                write_entry(entry, made, None)
    found = read_entry(entry)
    return made or make() if found is None else found[0]


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Lets one process work at a time. Where the file system has no locks, each process does the work."""
    lock = FileLock(path)
    try:
        lock.acquire()
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()


def read_entry(entry: Path) -> tuple[Arrays, Any] | None:
    """The arrays, mapped, and the noted account (JSON); None where the entry is missing or damaged."""
    try:
        account = json.loads((entry / ACCOUNT).read_text(encoding="utf-8"))
        names = account["arrays"]
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
        if account["sha256"] != _digest_of(arrays):
            return None
        with suppress(OSError):  # another user's
            os.utime(entry)
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return arrays, account["account"]


def write_entry(entry: Path, arrays: Mapping[str, NDArray[Any]], account: object) -> None:
    """The inverse of ``read_entry``; raises OSError, and then leaves nothing."""
    part = entry.with_name(f".{entry.name[:8]}-{secrets.token_hex(4)}")
    part.mkdir()
    try:
        for name, array in arrays.items():
            np.save(part / f"{name}.npy", array, allow_pickle=False)
        noted = {"account": account, "arrays": list(arrays), "sha256": _digest_of(arrays)}
        (part / ACCOUNT).write_text(json.dumps(noted), encoding="utf-8")
        # Only a damaged entry can be in its place.
        shutil.rmtree(entry, ignore_errors=True)
        part.rename(entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_unused(folder: Path) -> None:
    """Removes old entries, leftovers of stopped processes, locks and unreadable entries."""
    for path in folder.iterdir():
        if re.fullmatch(r"[0-9a-f]{64}(\.lock|\.mistake)?|\.[0-9a-f]{8}-[0-9a-f]{8}", path.name) is None:
            continue
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _UNUSED_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _digest_of(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
