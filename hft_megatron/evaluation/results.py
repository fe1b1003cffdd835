"""The files of an evaluation: values of every model and task, and the answers to every example."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hft_megatron.config.run_folder import write_atomically
from hft_megatron.errors import UserError
from hft_megatron.evaluation.journal import journal_of

FORMAT = 1
"""Version of the result file."""


def predictions_of(output: Path) -> Path:
    """The file beside a result file that has a line for every example: ``results.predictions.jsonl``."""
    return output.with_name(f"{output.stem}.predictions.jsonl")


def check_output(output: Path) -> None:
    """Raises UserError where a result file would overwrite another one, or cannot be written."""
    if output.suffix != ".json":
        raise UserError(f"--output {output}: the result file is JSON; give it a name that ends in .json.")
    # Predictions beside a journal belong to a command that was killed before it wrote the results: it resumes.
    unfinished = journal_of(output).exists()
    for path in (output, *(() if unfinished else (predictions_of(output),))):
        if path.exists():
            raise UserError(f"--output {output}: {path} already exists; remove it, or choose another name.")


def write_results(
    output: Path, results: Mapping[str, Any], records: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
) -> None:
    """Writes both files, the predictions first, so that a result file is complete. Raises UserError where that fails,
    or where a result file has appeared there meanwhile."""
    if output.exists():
        raise UserError(
            f"--output {output} already exists; remove it and run the command again, which has all answers."
        )
    lines = [
        _json({"model": model, "task": task, **record})
        for (model, task), of_task in records.items()
        for record in of_task
    ]
    predictions = predictions_of(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(predictions, "".join(f"{line}\n" for line in lines))
        whole = {**results, "predictions": predictions.name}
        write_atomically(output, _json(whole, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be written: {error}; free some space, and run the command again."
        ) from error


def _json(value: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON text that UTF-8 can hold: where a text has half of a surrogate pair, all except ASCII is escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent, allow_nan=False)
    return text
