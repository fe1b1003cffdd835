"""Tokenized sources on disk: one process of a start reads and tokenizes them, all others map what it wrote.

An entry is named by a digest of everything that decides its tokens, so it is never out of date, and whoever removes it
loses nothing but time.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from hft_megatron.data.files.rows import kind_of_file
from hft_megatron.data.files.sources import SourceFiles
from hft_megatron.data.stores import ExamplesInMemory
from hft_megatron.errors import UserError

_ACCOUNT, _MISTAKE = "account.json", ".mistake"
_ARRAYS = ("tokens", "trained", "offsets")


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenized:
    """The examples of one source and what became of its records."""

    store: ExamplesInMemory
    account: dict[str, Any]
    """As JSON has it."""


def user_cache(name: str) -> Path:
    """The folder of this package's cache ``name``, where those of users belong by the XDG rules."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hft_megatron" / name


class TokenCache:
    """A folder of entries. In a user's own cache that can't be written nothing is kept: every process tokenizes."""

    def __init__(self, folder: str | None) -> None:
        """``folder`` is --data-cache-path, the user's own cache when None.

        Raises UserError for a given folder that can't be made or written.
        """
        self._folder: Path | None = Path(folder) if folder is not None else user_cache("data")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(self._folder, os.W_OK)
            reason = "it can't be written"
        except OSError as error:
            writable, reason = False, error.strerror or str(error)
        if not writable and folder is not None:
            raise UserError(f"--data-cache-path {folder} can't be used: {reason}; name a folder that can be written.")
        if not writable:
            self._folder = None

    def tokenized(self, decisive: object, make: Callable[[], Tokenized]) -> Tokenized:
        """The entry of ``decisive`` (JSON), made by ``make`` in one process, for which the others wait.

        What ``make`` raises as UserError is raised in the processes that have waited for it, too.
        """
        if self._folder is None:
            return make()
        key = _digest([decisive, _code()])
        mistake = self._folder / f"{key}{_MISTAKE}"
        before = _version(mistake)
        with _lock(self._folder / f"{key}.lock"):
            entry = self._folder / key
            found = _read(entry)
            if found is not None:
                return found
            if _version(mistake) not in (before, None):
                raise UserError(mistake.read_text(encoding="utf-8"))
            try:
                made = make()
            except UserError as error:
                with suppress(OSError):
                    mistake.write_text(str(error), encoding="utf-8")
                raise
            with suppress(OSError):  # A full disk costs the next process its time, and nothing else.
                _write(entry, made)
                mistake.unlink(missing_ok=True)
        # As the others have it: this process' own copy goes.
        return _read(entry) or made


def tokenized(cache: TokenCache | None, decisive: object, make: Callable[[], Tokenized]) -> Tokenized:
    """``TokenCache.tokenized``, or what ``make`` makes without a cache; the account is as JSON has it either way."""
    if cache is not None:
        return cache.tokenized(decisive, make)
    made = make()
    return replace(made, account=json.loads(json.dumps(made.account)))


def named(source: SourceFiles, digests: Sequence[str]) -> list[list[str]]:
    """Each file of a source by its contents and by how its name says that they are read."""
    return [[kind_of_file(file), digest] for file, digest in zip(source.files, digests, strict=True)]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Where the file system has no locks, processes that come at once each do the work."""
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


def _read(entry: Path) -> Tokenized | None:
    """The entry, its arrays mapped; None where it is missing or damaged."""
    try:
        account = json.loads((entry / _ACCOUNT).read_text(encoding="utf-8"))
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        if account.pop("sha256") != _digest_of(arrays):
            return None
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return Tokenized(store=ExamplesInMemory(**arrays), account=account["account"])


def _write(entry: Path, made: Tokenized) -> None:
    arrays: dict[str, NDArray[Any]] = {name: getattr(made.store, name) for name in _ARRAYS}
    part = Path(tempfile.mkdtemp(prefix=f".{entry.name[:8]}-", dir=entry.parent))
    try:
        for name, array in arrays.items():
            np.save(part / f"{name}.npy", array, allow_pickle=False)
        account = {"account": made.account, "sha256": _digest_of(arrays)}
        (part / _ACCOUNT).write_text(json.dumps(account), encoding="utf-8")
        # Only a damaged one can be in its place.
        shutil.rmtree(entry, ignore_errors=True)
        part.rename(entry)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _version(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _digest_of(arrays: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in _ARRAYS:
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@cache
def _code() -> list[str]:
    """What makes tokens of the same files: this package's code for data, and the libraries it asks."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return [
        digest.hexdigest(),
        *(importlib.metadata.version(name) for name in ("jinja2", "sentencepiece", "tokenizers")),
    ]
