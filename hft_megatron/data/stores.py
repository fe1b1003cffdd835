"""Tokenized examples: in memory or on disk, and kept between starts.

An entry is named by a digest of everything that decides its tokens, so it is never out of date, and whoever removes it
loses nothing but time.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import secrets
import shutil
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from hft_megatron.data.files.sources import SourceFiles, kind_of_file
from hft_megatron.errors import UserError

_MOST_NAMED = 8
_OF_RECORD = re.compile(r"(.*)(:\d+(?:, record \d+)?|: row \d+)", re.DOTALL)
"""Places of lines, of records of an array, and of rows of a Parquet file."""
_PLACE = re.compile(r"(\d+)(:.*)")
Encoded = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""Token ids of an example and which of them are trained, both of shape (tokens,)."""


class ExampleStore(Protocol):
    """The examples of one source, numbered from 0."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each example, shape (examples,)."""

    def example(self, index: int) -> Encoded:
        """One example."""

    def place(self, index: int) -> str:
        """Where an example's record is, as ``places_in`` has it; empty where that isn't kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExamplesInMemory:
    """Examples end to end in two flat arrays."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    """Example i is ``tokens[offsets[i]:offsets[i + 1]]``; shape (examples + 1,)."""
    places: NDArray[np.bytes_]
    """Where the examples' records are, as ``places_in`` has it; shape (examples,)."""

    @staticmethod
    def of(examples: Sequence[Encoded], places: Sequence[str]) -> "ExamplesInMemory":
        """Copies of at least one example, whose records are at ``places``."""
        return ExamplesInMemory(
            tokens=np.concatenate([ids for ids, _ in examples]),
            trained=np.concatenate([mask for _, mask in examples]),
            offsets=np.concatenate([[0], np.cumsum([len(ids) for ids, _ in examples])]).astype(np.int64),
            places=np.array(places, dtype=np.bytes_),
        )

    def part(self, first: int, count: int) -> "ExamplesInMemory":
        """``count`` examples from ``first`` on, in the same memory."""
        return replace(self, offsets=self.offsets[first : first + count + 1], places=self.places[first : first + count])

    @property
    def lengths(self) -> NDArray[np.int32]:
        return np.diff(self.offsets).astype(np.int32)

    def example(self, index: int) -> Encoded:
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[span], self.trained[span]

    def place(self, index: int) -> str:
        return bytes(self.places[index]).decode()


@dataclass(frozen=True, kw_only=True)
class NamedSource:
    """Members of one source, examples or pairs, and where each comes from."""

    path: str
    """As written."""
    files: tuple[str, ...]
    members: int
    place: Callable[[int], str]
    """Of a member by number: as ``place_in`` has it, or empty."""

    def word(self, kind: str, member: int) -> str:
        """``a.jsonl:17``, or ``example 3 of a`` where nothing but the number (from 1) is known."""
        place = _PLACE.fullmatch(self.place(member))
        return f"{kind} {member + 1} of {self.path}" if place is None else f"{self.files[int(place[1])]}{place[2]}"


def named_members(kind: str, members: Sequence[int], sources: Sequence[NamedSource]) -> str:
    """``a.jsonl:17, a.jsonl:3 and 6 more``: where ``members``, numbered from 0 over all ``sources``, come from."""
    starts = list(accumulate((source.members for source in sources), initial=0))
    words = []
    for member in members[:_MOST_NAMED]:
        source = bisect_right(starts, member) - 1
        words.append(sources[source].word(kind, member - starts[source]))
    more = f" and {len(members) - _MOST_NAMED} more" if len(members) > _MOST_NAMED else ""
    return ", ".join(words) + more


def places_in(files: Sequence[Path], places: Sequence[str]) -> list[str]:
    """``0:17`` of ``a.jsonl:17``: the number of a record's file among a source's, and what follows the file's name."""
    numbers = {str(file): number for number, file in enumerate(files)}
    found = []
    for place in places:
        match = _OF_RECORD.fullmatch(place)
        assert match is not None, place
        found.append(f"{numbers[match[1]]}{match[2]}")
    return found


def numbered(kind: str, numbers: Sequence[int]) -> str:
    """``example 3``, ``examples 3, 17``, or the first ``_MOST_NAMED`` of them and how many more there are."""
    listed = ", ".join(str(number) for number in numbers[:_MOST_NAMED])
    more = f" and {len(numbers) - _MOST_NAMED} more" if len(numbers) > _MOST_NAMED else ""
    return f"{kind}{'s' if len(numbers) > 1 else ''} {listed}{more}"


_OPTION = "--data-cache-path"
_ACCOUNT = "account.json"
_UNUSED_S = 30 * 24 * 3600
"""After this many seconds without a use an entry is removed."""
_ARRAYS = ("tokens", "trained", "offsets", "places")


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenized:
    """The examples of one source and what became of its records."""

    store: ExamplesInMemory
    account: dict[str, Any]
    """As JSON has it."""
    note: str = ""
    """Where these are mapped from, and who made them, as a line for the log."""


def user_cache(name: str, option: str) -> Path:
    """The folder of this package's cache ``name``, where those of users belong by the XDG rules.

    Raises UserError where the user has no home directory, naming the ``option`` that gives another folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hft_megatron" / name
    except RuntimeError:
        raise UserError(f"{option} is missing, and there is no home directory for a cache; name a folder.") from None


class TokenCache:
    """A folder of entries. In a user's own cache that can't be written nothing is kept: every process tokenizes."""

    def __init__(self, folder: str | None) -> None:
        """``folder`` is --data-cache-path, the user's own cache when None.

        Raises UserError for a given folder that can't be made or written.
        """
        self._folder: Path | None = None
        try:
            found = user_cache("data", _OPTION) if folder is None else Path(folder)
            found.mkdir(parents=True, exist_ok=True)
            if not os.access(found, os.W_OK):
                raise UserError(f"{_OPTION} {folder} can't be used: it can't be written; name another folder.")
            self._folder = found
        except UserError:
            if folder is not None:
                raise
        except OSError as error:
            if folder is not None:
                raise UserError(
                    f"{_OPTION} {folder} can't be used: {error.strerror}; name a folder that can be written."
                ) from error

    def tokenized(self, decisive: object, make: Callable[[], Tokenized]) -> Tokenized:
        """The entry of ``decisive`` (JSON), made by ``make`` in one process, for which the others wait.

        What ``make`` raises as UserError is raised in the processes that have waited for it, too.
        """
        if self._folder is None:
            return make()
        key = _digest([decisive, _code()])
        entry, mistake = self._folder / key, self._folder / f"{key}.mistake"
        account_before, mistake_before = _version(entry / _ACCOUNT), _version(mistake)
        # All ranks look at all of it, and not one after the other.
        if (found := _read(entry)) is not None:
            return replace(found, note=f"tokens are taken from {entry}, where an earlier process has kept them")
        made: Tokenized | None = None
        with _lock(self._folder / f"{key}.lock"):
            if _version(mistake) not in (mistake_before, None):
                raise UserError(mistake.read_text(encoding="utf-8"))
            if _version(entry / _ACCOUNT) == account_before:
                made = self._make(entry, mistake, make)
        # As the others have it: this process' own copy goes.
        return _read(entry) or made or make()

    def _make(self, entry: Path, mistake: Path, make: Callable[[], Tokenized]) -> Tokenized:
        try:
            made = make()
        except UserError as error:
            with suppress(OSError):
                mistake.write_text(str(error), encoding="utf-8")
            raise
        with suppress(OSError):  # A full disk costs the next process its time, and nothing else.
            _remove_unused(entry.parent)
            _write(entry, made)
            mistake.unlink(missing_ok=True)
        return made


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
        if account["sha256"] != _digest_of(arrays):
            return None
        with suppress(OSError):  # another user's
            os.utime(entry)
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return Tokenized(store=ExamplesInMemory(**arrays), account=account["account"], note=f"tokens are kept in {entry}")


def _write(entry: Path, made: Tokenized) -> None:
    arrays: dict[str, NDArray[Any]] = {name: getattr(made.store, name) for name in _ARRAYS}
    part = entry.with_name(f".{entry.name[:8]}-{secrets.token_hex(4)}")
    part.mkdir()
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


def _remove_unused(folder: Path) -> None:
    """Entries, what a stopped process left of one, locks and mistakes, all of long ago."""
    for path in folder.iterdir():
        if re.fullmatch(r"[0-9a-f]{64}(\.lock|\.mistake)?|\.[0-9a-f]{8}-[0-9a-f]{8}", path.name) is None:
            continue
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _UNUSED_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


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
