"""``hft-megatron evaluate`` on a rank of a pool, tasks of every kind for a tiny model, and the results of a command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.support.tasks import write_tasks

COUNT = 7
"""Rows of every task: not a multiple of the batches, or of the replicas, of any test."""


def write_all_kinds(folder: Path) -> Path:
    """``folder/tasks.yaml`` with a task of each kind, in which a prompt is cut and no stop string comes."""
    words = ["bridge", "river", "old house", "tree", "Überfahrt", "of the", "3"]
    _write_rows(
        folder / "rows.jsonl",
        [
            {
                "question": f"Say {word}{'!' * number}" + " again" * (60 if number == 2 else 0),
                "answer": word,
                "options": [word, words[number - 1], "none of these"],
            }
            for number, word in enumerate(words)
        ],
    )
    _write_rows(
        folder / "texts.jsonl", [{"text": f"{word} and {words[-1]} " * (1 + n)} for n, word in enumerate(words)]
    )
    _write_rows(
        folder / "pairs.jsonl",
        [{"prompt": f"Say {word}: ", "chosen": word, "rejected": f"not {word}"} for word in words],
    )
    return write_tasks(
        folder,
        {
            "name": "continued",
            "kind": "generate",
            "files": "rows.jsonl",
            "prompt": "question",
            "target": "answer",
            "stop": ["this never comes"],
            "max_new_tokens": 12,
            "cut_long_prompts": True,
            "metrics": ["exact_match", "bleu", "edit_similarity"],
        },
        {
            "name": "drawn",
            "kind": "generate",
            "files": "rows.jsonl",
            "prompt": "question",
            "target": "answer",
            "max_new_tokens": 8,
            "temperature": 0.8,
            "top_k": 20,
            "cut_long_prompts": True,
        },
        {
            "name": "chosen",
            "kind": "choose",
            "files": "rows.jsonl",
            "prompt": "question",
            "choices": "options",
            "answer": "answer",
            "target_delimiter": " ",
            "cut_long_prompts": True,
            "metrics": ["accuracy", "accuracy_per_token", "accuracy_per_byte", "probability"],
        },
        {"name": "texts", "kind": "text", "files": "texts.jsonl", "window": 24, "stride": 10},
        {"name": "pairs", "kind": "preference", "files": "pairs.jsonl"},
    )


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def run_evaluate(words: Sequence[str]) -> dict[str, Any]:
    """Runs ``hft-megatron evaluate WORDS`` on this rank of a pool; every rank must call it.

    Returns ``said``, the lines of its log, and the sentences of a UserError and of another
    failure, or None: ``mistake`` and ``failure``.
    """
    from hft_megatron.cli import evaluate
    from hft_megatron.cli.boundary import StatusFolder
    from hft_megatron.config.loading import load_options
    from hft_megatron.errors import RankFailed, RunFailed, UserError

    said: list[str] = []
    failures: dict[str, str | None] = {"mistake": None, "failure": None}
    with (
        # Neither the process group nor the pool's place may end with the command.
        patch("hft_megatron.parallel.groups.stop_groups", lambda: None),
        patch.object(evaluate, "note", said.append),
    ):
        try:
            evaluate.run(load_options(evaluate.EvaluateOptions, list(words)), StatusFolder())
        except UserError as error:
            failures["mistake"] = str(error)
        except (RankFailed, RunFailed) as error:
            failures["failure"] = str(error)
    return {"said": said, **failures}


def words_of(tasks: Path, output: Path, *models: object, **options: object) -> list[str]:
    """The words of the command, in fp32; ``batch_size=3`` becomes ``--batch-size 3``."""
    words: list[object] = ["--model", *models, "--tasks", tasks, "--output", output, "--no-bf16"]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", value]
    return [str(word) for word in words]


def results_of(output: Path) -> dict[str, Any]:
    """The result file, read as strictly as any JSON reader would."""
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"), parse_constant=_refuse)
    return found


def records_of(output: Path) -> list[dict[str, Any]]:
    """The answers to every example, model by model and task by task."""
    path = output.with_name(results_of(output)["predictions"])
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return [json.loads(line, parse_constant=_refuse) for line in lines]


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")
