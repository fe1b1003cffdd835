"""A search for secrets in places where they must not be."""

from collections.abc import Sequence
from pathlib import Path

CHUNK = 1 << 24


def files_with(words: Sequence[str], folders: Sequence[Path]) -> dict[str, list[Path]]:
    """By word: the files below ``folders`` that hold it, byte for byte; links are not followed."""
    found: dict[str, list[Path]] = {word: [] for word in words}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                for word in _words_in(path, words):
                    found[word].append(path)
    return found


def _words_in(path: Path, words: Sequence[str]) -> set[str]:
    held: set[str] = set()
    longest = max(len(word.encode()) for word in words)
    rest = b""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            text = rest + chunk
            held |= {word for word in words if word.encode() in text}
            rest = text[-longest:]
    return held
