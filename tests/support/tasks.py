"""Tasks made on the spot, and their questions."""

from pathlib import Path
from typing import Any

import yaml

from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.evaluation.examples import EvalExample, SequenceScore, TaskExamples
from hft_megatron.evaluation.kinds import KINDS
from hft_megatron.evaluation.task_files import read_tasks
from hft_megatron.evaluation.tasks import Task


def write_tasks(folder: Path, *tasks: dict[str, Any]) -> Path:
    """``folder/tasks.yaml`` with these entries."""
    path = folder / "tasks.yaml"
    path.write_text(yaml.safe_dump(list(tasks), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def task_of(folder: Path, **settings: Any) -> Task:
    """The only task of a file with these settings."""
    (task,) = read_tasks(write_tasks(folder, {"name": "made", **settings}))
    return task


def asked(task: Task, tokenizer: Tokenizer, window: int = 4096) -> TaskExamples:
    """The questions of the task for a model with this window."""
    return KINDS[task.kind].read(task, tokenizer, window)


def prompt_text(example: EvalExample, tokenizer: Tokenizer) -> str:
    """The text of the prompt, without its begin token."""
    assert example.prompt is not None
    return tokenizer.decode(example.prompt.tolist())


def scored_texts(example: EvalExample, tokenizer: Tokenizer) -> list[str]:
    """The texts that the scored tokens of each sequence add to those before them; they are the last ones."""
    texts = []
    for ids, scored in example.sequences:
        first = int(scored.argmax())
        assert scored[first:].all()
        prompt, whole = tokenizer.decode(ids[:first].tolist()), tokenizer.decode(ids.tolist())
        assert whole.startswith(prompt)
        texts.append(whole[len(prompt) :])
    return texts


def scores(example: EvalExample, *log_probs: float) -> list[SequenceScore]:
    """Answers of a model that gives the sequences these log-probabilities."""
    return [
        SequenceScore(log_prob=log_prob, tokens=int(scored.sum()), is_greedy=False)
        for log_prob, (_, scored) in zip(log_probs, example.sequences, strict=True)
    ]
