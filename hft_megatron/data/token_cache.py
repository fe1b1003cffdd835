"""Tokens that are kept between starts.

An entry is named by a digest of everything that decides its tokens, so it is never out of date, and deleting it
costs only time.
"""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from hft_megatron.data.dataset import ExamplesInMemory
from hft_megatron.data.files.sources import SourceFiles, kind_of_file
from hft_megatron.data.formats.table import FORMATS
from hft_megatron.data.kept import (
    ACCOUNT,
    folder_for_entries,
    key_of,
    one_at_a_time,
    read_entry,
    remove_unused,
    write_entry,
)
from hft_megatron.errors import UserError

_OPTION = "--data-cache-path"
_ARRAYS = ("tokens", "trained", "offsets", "places")


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenized:
    """The examples of one source and an account of its records."""

    store: ExamplesInMemory
    account: dict[str, Any]
    """Account in JSON types."""
    note: str = ""
    """A line for the log: the entry that these are mapped from, and its maker."""


def user_cache(name: str, option: str) -> Path:
    """The folder of this package's cache ``name``, in the user's cache folder by the XDG rules.

    Raises UserError where the user has no home directory, naming the ``option`` that sets another folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hft_megatron" / name
    except RuntimeError:
        raise UserError(f"{option} is missing, and there is no home directory for a cache; name a folder.") from None


class TokenCache:
    """A folder of entries; without a folder nothing is kept, and every process tokenizes."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def tokenized(self, decisive: object, make: Callable[[], Tokenized]) -> Tokenized:
        """The entry of ``decisive`` (JSON), made by ``make`` in one process while the others wait.

        A UserError of ``make`` is also raised in the processes that have waited for it.
        """
        if self._folder is None:
            return _as_read(make())
        key = key_of([decisive, code_of_data()])
        entry, mistake = self._folder / key, self._folder / f"{key}.mistake"
        account_before, mistake_before = _version(entry / ACCOUNT), _version(mistake)
        # All ranks read all of it at once, and not one after the other.
        if (found := _read(entry)) is not None:
            return replace(found, note=f"tokens are read from {entry}, where an earlier process has cached them")
        made: Tokenized | None = None
        with one_at_a_time(self._folder / f"{key}.lock"):
            if _version(mistake) not in (mistake_before, None):
                raise UserError(mistake.read_text(encoding="utf-8"))
            if _version(entry / ACCOUNT) == account_before:
                made = self._make(entry, mistake, make)
        # Like the other processes: this one's own copy is freed.
        return _read(entry) or _as_read(made or make())

    def _make(self, entry: Path, mistake: Path, make: Callable[[], Tokenized]) -> Tokenized:
        try:
            made = make()
        except UserError as error:
            with suppress(OSError):
                mistake.write_text(str(error), encoding="utf-8")
            raise
        with suppress(OSError):  # A full disk costs the next process only its time.
            remove_unused(entry.parent)
            arrays = {name: getattr(made.store, name) for name in _ARRAYS}
            write_entry(entry, arrays, made.account)
            mistake.unlink(missing_ok=True)
        return made


NO_CACHE = TokenCache(None)


def open_token_cache(folder: str | None) -> TokenCache:
    """The cache of --data-cache-path, the user's own when None, which keeps nothing where it isn't writable.

    Raises UserError for a given folder that cannot be made or written.
    """
    try:
        found = user_cache("data", _OPTION) if folder is None else Path(folder)
        return TokenCache(folder_for_entries(found, _OPTION))
    except UserError:
        if folder is None:
            return NO_CACHE
        raise


def _as_read(made: Tokenized) -> Tokenized:
    """The result as an entry would return it: JSON has no tuples, and texts for keys."""
    return replace(made, account=json.loads(json.dumps(made.account)))


def named(source: SourceFiles, digests: Sequence[str]) -> list[list[str]]:
    """Identifies each file of a source by its contents and by the format in its name."""
    return [[kind_of_file(file), digest] for file, digest in zip(source.files, digests, strict=True)]


def _read(entry: Path) -> Tokenized | None:
    found = read_entry(entry)
    if found is None:
        return None
    arrays, account = found
    return Tokenized(store=ExamplesInMemory(**arrays), account=account, note=f"tokens are cached in {entry}")


def _version(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


_PACKAGE = Path(__file__).parent


def code_of_data() -> list[str]:
    """Versions of the code that makes tokens: this package's code for data, a user's own parsers, and their
    libraries."""
    digest = hashlib.sha256(_own_code())
    for name, format in FORMATS.items():
        digest.update(_code_of_parser(name, format.parse))
    return [
        digest.hexdigest(),
        *(importlib.metadata.version(name) for name in ("jinja2", "sentencepiece", "tokenizers")),
    ]


@cache
def _own_code() -> bytes:
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.digest()


def _code_of_parser(name: str, parse: Any) -> bytes:
    """A parser's file, or its compiled code where it has none; empty for this package's own."""
    while isinstance(parse, partial):
        parse = parse.func
    code = getattr(parse, "__code__", None) or getattr(type(parse).__call__, "__code__", None)
    if code is None:  # compiled
        return f"{name} {parse!r}".encode()
    file = Path(code.co_filename)
    if _PACKAGE in file.parents:
        return b""
    return name.encode() + (file.read_bytes() if file.is_file() else code.co_code)
