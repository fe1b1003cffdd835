"""Sequences of small tasks for ``hft-megatron continual``, and the results of such a command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hft_megatron.cli.continual import ContinualOptions
from hft_megatron.config.loading import load_options

NAMES = ("colours", "numbers", "animals")
SEQUENCE = """
- name: colours
  train_data_path: colours.jsonl
  train_iters: 4
  evaluate: {kind: generate, files: colours.jsonl, prompt: prompt, target: answer, max_new_tokens: 6,
             metrics: [edit_similarity, exact_match]}
- name: numbers
  train_data_path: numbers.jsonl
  train_epochs: 3
  lr: 1e-3
  evaluate: {kind: choose, files: numbers.jsonl, prompt: prompt, choices: options, answer: answer}
- name: animals
  train_data_path: animals.jsonl
  train_iters: 4
  evaluate: {kind: generate, files: animals.jsonl, prompt: prompt, target: answer, max_new_tokens: 6,
             metrics: edit_similarity}
"""
IGNORED = ("--ignore-keys", "options")
"""Options of training for the choices of the second task."""
GENERAL = "- {name: texts, kind: text, files: texts.jsonl}\n"
WORDS = ("bridge", "river", "old house", "tree", "of the", "and", "say", "water")
ROWS = 16


def write_sequence(folder: Path) -> Path:
    """``folder/tasks.yaml``, three tasks of 16 examples for batches of 4, and ``folder/general.yaml``."""
    for offset, name in enumerate(NAMES):
        rows: list[dict[str, Any]] = [
            {"prompt": f"{name} {number}:", "answer": WORDS[(number + offset) % len(WORDS)]} for number in range(ROWS)
        ]
        if name == "numbers":
            rows = [{**row, "options": [row["answer"], WORDS[(n + 4) % len(WORDS)]]} for n, row in enumerate(rows)]
        write_rows(folder / f"{name}.jsonl", rows)
    write_rows(folder / "texts.jsonl", [{"text": f"{word} {word} by the water"} for word in WORDS])
    (folder / "general.yaml").write_text(GENERAL)
    tasks = folder / "tasks.yaml"
    tasks.write_text(SEQUENCE.replace("train_data_path: ", f"train_data_path: {folder}/"))
    return tasks


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def options_of(tasks: Path, save: Path, *words: object) -> ContinualOptions:
    """The parsed options of a sequence, without checks."""
    given = ["--continual-tasks", tasks, "--save", save, *words]
    return load_options(ContinualOptions, [str(word) for word in given])
