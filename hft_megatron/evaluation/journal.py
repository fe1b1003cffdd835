"""Answers of an unfinished evaluation, from which a killed one resumes."""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hft_megatron.errors import RankFailed, UserError
from hft_megatron.evaluation.examples import Answer, Generated, SequenceScore, TextDifference


def journal_of(output: Path) -> Path:
    """The journal of an evaluation with this result file."""
    return output.with_name(f"{output.name}.unfinished.jsonl")


class Journal:
    """A file beside the result file: the settings of the evaluation, then a line for every batch of answers.

    One process writes it, which holds a lock until it ends. A line that a crash has torn is dropped, and its batch is
    answered again.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        """Reads an earlier command's answers. Raises UserError where that was another evaluation, cannot be read, is
        being written, or is finished."""
        self.path = journal_of(output)
        self.answers: dict[tuple[str, str], dict[int, list[Answer]]] = {}
        """Answers found, by model, task and number of the batch."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
            try:
                self._begin(output, settings)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise UserError(
                f"--output {output} cannot be written: {error}; free some space, or choose another folder."
            ) from error

    def _begin(self, output: Path, settings: Mapping[str, Any]) -> None:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"--output {output} is being written by another command; wait for it, or choose another name."
            ) from None
        # From the locked file itself: closing another handle of it would end the lock.
        self._file.seek(0)
        # A byte stays a character, so that the length is the file's; damaged JSON is found below.
        lines = self._file.read().decode("latin-1").split("\n")[:-1]
        if output.exists():
            if not lines:
                self.path.unlink(missing_ok=True)
            raise UserError(f"--output {output} already exists; remove it, or choose another name.")
        if lines:
            self._check(lines[0], settings, output)
        for number, line in enumerate(lines[1:], start=2):
            self._take(line, number)
        # Without a torn line.
        self._file.truncate(sum(len(line) + 1 for line in lines))
        if not lines:
            self._write(settings)

    def _check(self, header: str, settings: Mapping[str, Any], output: Path) -> None:
        try:
            held = json.loads(header)
        except ValueError:
            held = None
        if not isinstance(held, dict):
            raise UserError(f"{self.path}:1 is damaged; delete the file to start again.")
        wanted = json.loads(json.dumps(settings))
        if held != wanted:
            raise UserError(
                f"--output {output}: {self.path.name} is of an evaluation with other {differing(held, wanted)}; run "
                f"that command again to finish it, delete the file, or choose another --output."
            )

    def _take(self, line: str, number: int) -> None:
        try:
            noted = json.loads(line)
            answers = [_answer(one) for one in noted["answers"]]
            self.answers.setdefault((noted["model"], noted["task"]), {})[int(noted["batch"])] = answers
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}:{number} is damaged; delete the file to start again.") from error

    def add(self, model: str, task: str, batch: int, answers: Sequence[Answer]) -> None:
        """Writes a batch, which is on the disk afterwards. Raises RankFailed where that fails."""
        noted = {"model": model, "task": task, "batch": batch, "answers": [asdict(answer) for answer in answers]}
        try:
            self._write(noted)
        except OSError as error:
            raise RankFailed(
                f"rank 0 cannot write {self.path}: {error}; free some space, and run the command again to resume."
            ) from error

    def _write(self, value: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(value).encode("ascii") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self, *, finished: bool) -> None:
        """Closes the file; with ``finished`` it is no longer needed."""
        if finished:
            # Before another command can lock it.
            self.path.unlink(missing_ok=True)
        self._file.close()


def _answer(noted: Mapping[str, Any]) -> Answer:
    if "ids" in noted:
        return Generated(ids=tuple(noted["ids"]), text=noted["text"], ended_by=noted["ended_by"])
    return TextDifference(**noted) if "base_nats" in noted else SequenceScore(**noted)


def differing(held: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Names of the differences between two evaluations, for a sentence."""
    names = sorted(key for key in {*held, *settings} if held.get(key) != settings.get(key))
    one, other = held.get("settings"), settings.get("settings")
    if names == ["settings"] and isinstance(one, Mapping) and isinstance(other, Mapping):
        names = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    return ", ".join(name.replace("_", " ") for name in names)
