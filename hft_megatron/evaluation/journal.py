"""What an evaluation that has not come to its end was answered, so that a killed one resumes where it stood."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hft_megatron.errors import UserError
from hft_megatron.evaluation.examples import Answer, Generated, SequenceScore, TextDifference

ENDING = ".unfinished.jsonl"
"""Follows the name of the result file."""


class Journal:
    """A file beside the result file: the settings of the evaluation, then a line for every batch of answers.

    One process writes it. A line that a crash has torn is dropped, and its batch is asked again.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        """Reads what an earlier command has left. UserError where that was another evaluation, or can't be read."""
        self.path = output.with_name(output.name + ENDING)
        self.answers: dict[tuple[str, str], dict[int, list[Answer]]] = {}
        """Found, by model, task and number of the batch."""
        lines = self._read()
        if not lines:
            lines = [json.dumps(settings, sort_keys=True)]
        elif lines[0] != json.dumps(settings, sort_keys=True):
            raise UserError(
                f"--output {output}: {self.path.name} is of an evaluation with other {_differing(lines[0], settings)}; "
                f"give that command again to finish it, delete the file, or choose another --output."
            )
        for line in lines[1:]:
            noted = json.loads(line)
            batches = self.answers.setdefault((noted["model"], noted["task"]), {})
            batches[noted["batch"]] = [_answer(one) for one in noted["answers"]]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Without what was torn.
            self.path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--output {output} can't be written: {error}; make room, or choose another folder."
            ) from error

    def _read(self) -> list[str]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise UserError(f"--output: {self.path} can't be read ({error}); delete it to begin anew.") from error
        return text.split("\n")[:-1]

    def add(self, model: str, task: str, batch: int, answers: Sequence[Answer]) -> None:
        """Writes a batch, so that it is on the disk afterwards. Raises OSError."""
        noted = {"model": model, "task": task, "batch": batch, "answers": [asdict(answer) for answer in answers]}
        self._file.write(json.dumps(noted) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self, *, finished: bool) -> None:
        """Closes the file; with ``finished`` it is not needed any more."""
        self._file.close()
        if finished:
            self.path.unlink()


def _answer(noted: Mapping[str, Any]) -> Answer:
    if "ids" in noted:
        return Generated(ids=tuple(noted["ids"]), text=noted["text"], ended_by=noted["ended_by"])
    return TextDifference(**noted) if "base_nats" in noted else SequenceScore(**noted)


def _differing(header: str, settings: Mapping[str, Any]) -> str:
    try:
        held = json.loads(header)
        return ", ".join(sorted(key for key in {*held, *settings} if held.get(key) != settings.get(key)))
    except (ValueError, TypeError, AttributeError):
        return "settings"
