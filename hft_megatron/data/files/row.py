"""What every reader of data files yields."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record as plain values: what ``json.loads`` gives."""

    place: str
    """``file:line`` or the like, which stands in front of a sentence about the row."""
    value: Any
