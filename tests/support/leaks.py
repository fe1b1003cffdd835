"""Whether a secret has got anywhere it must not be."""

from collections.abc import Iterable
from pathlib import Path

CHUNK = 1 << 24


def files_with(secret: str, folders: Iterable[Path]) -> list[Path]:
    """Every file below ``folders`` that holds the bytes of ``secret``; links are not followed. There must be files."""
    wanted, found, read = secret.encode(), [], 0
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                read += 1
                if _holds(path, wanted):
                    found.append(path)
    assert read > 0
    return found


def _holds(path: Path, wanted: bytes) -> bool:
    rest = b""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            if wanted in rest + chunk:
                return True
            rest = chunk[-len(wanted) :]
    return False
