"""Replay of earlier tasks: records drawn from their training data before the sequence begins."""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hft_megatron.config.run_folder import write_atomically
from hft_megatron.data.files.rows import Row
from hft_megatron.data.files.sources import TRAIN_SPLIT, find_input, read_rows
from hft_megatron.errors import UserError
from hft_megatron.methods.continual.sequence import Part
from hft_megatron.methods.continual.tasks import ContinualTask


def write_replays(parts: tuple[Part, ...], *, ratio: float, seed: int) -> list[str]:
    """Writes the files that stages replay, one for each pair of a stage and an earlier task. Returns lines for the log.

    Of n records round(ratio x n) are drawn, at least one, in their own order; the draw depends on the seed and the
    names of the two tasks alone. Raises UserError for an existing file with other records, which is not overwritten.
    """
    lines = []
    for part in parts:
        for path, earlier in part.replays:
            rows = list(_rows(earlier))
            count = max(1, round(ratio * len(rows)))
            draw = random.Random(f"{seed} {part.stage.folder.name} {earlier.name}")
            chosen = sorted(draw.sample(range(len(rows)), count))
            text = "".join(json.dumps(rows[number], ensure_ascii=False) + "\n" for number in chosen)
            _write(path, text)
            lines.append(f"{part.stage.folder.name} replays {count:,} of {len(rows):,} records of {earlier.name}")
    return lines


def _rows(task: ContinualTask) -> Iterator[Mapping[str, Any]]:
    """All training records of a task. A table's row is a record by its columns."""
    for path in find_input("--train-data-path", task.config.data.train_data_path, TRAIN_SPLIT):
        for row in read_rows(path):
            yield _record(row)


def _record(row: Row) -> Mapping[str, Any]:
    if not isinstance(row.value, Mapping):
        raise UserError(f"{row.place}: --replay-ratio draws records, and this is none; write the data as JSON Lines.")
    return row.value


def _write(path: Path, text: str) -> None:
    try:
        if path.exists():
            if path.read_text(encoding="utf-8") == text:
                return
            raise UserError(
                f"{path} holds other records than --replay-ratio and --seed draw now: the sequence was started with "
                f"other values or data; use those again, or another --save."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}; free some space, or choose another --save.") from error
