"""What the readers of data files yield."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record as plain values: what ``json.loads`` gives."""

    place: str
    """``file:line`` or the like, which stands in front of a sentence about the row."""
    value: Any
    kind: Literal["json", "parquet", "table"] = "json"
    """How the file writes what is missing: without its key, as a null at any depth, or as an empty cell."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a text file that is not parsed yet, so that another process may do it, or pass over a bad one."""

    place: str
    raw: bytes
    """With its end; cut behind the longest that a line may have."""
    plain: bool = False
    """Whether it is a document's text and not JSON."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A row where its file makes it one, else a line."""

    item: Row | Line
    size: int
    """Bytes that it takes, about."""
    position: int
    """Bytes of the file that were read for it and all before it."""
