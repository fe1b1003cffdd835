"""The names of preprocessed data: a prefix, and what stands behind it."""

from pathlib import Path

FACTS, LOSS_MASK, BOUNDARIES = "_preprocessed.json", "_loss_mask", "_boundaries"
"""The companions of PREFIX.bin and PREFIX.idx; the last two are .bin and .idx as well."""
UNFINISHED, BAD_LINES = "_unfinished", "_bad_lines.jsonl"
"""The folder of what isn't complete, and the records that were passed over."""


def is_prefix(path: str) -> bool:
    """Whether the names of preprocessed data, complete or not, begin so."""
    return any(Path(f"{path}{end}").exists() for end in (".idx", ".bin", FACTS, UNFINISHED))
