"""Scores the best answer that ignores the question in each task: the bar that a trained model must clear.

Run: ``python tools/continual/majority.py [--tasks runs/continual/tasks/tasks.yaml]``. In tasks of TRACE's shape this
answer is the one of train.json with the highest score on test.json; where answers are classes, the score is the share
of the most frequent one.
"""

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from hft_megatron.evaluation.extraction import extractor
from hft_megatron.evaluation.measures import MEASURES
from hft_megatron.evaluation.task_files import read_tasks
from hft_megatron.evaluation.tasks import Task

CANDIDATES = 50
"""Answers that are tried, the most frequent ones of the training rows."""


def majority(task: Task) -> float:
    """The score of the best constant answer by the task's first measure."""
    train, test = (_rows(replace(task, split=split)) for split in ("train", "test"))
    frequent = Counter(extractor(task.extract)(row["answer"]) for row in train).most_common(CANDIDATES)
    return max(_score(task, answer, test) for answer, _ in frequent)


def _rows(task: Task) -> list[dict[str, str]]:
    return [row for path in task.paths() for row in json.loads(path.read_text(encoding="utf-8"))]


def _score(task: Task, answer: str, rows: list[dict[str, str]]) -> float:
    measure, extract = MEASURES[task.metrics[0]], extractor(task.extract_target)
    assert measure.statistics is not None
    each = [measure.statistics(answer, [extract(row["answer"])], row["prompt"]) for row in rows]
    return measure.total([sum(column) for column in zip(*each, strict=True)])


def main() -> None:
    """Prints a line for every task."""
    parser = argparse.ArgumentParser(description="Score the best constant answer in tasks of TRACE's shape.")
    parser.add_argument(
        "--tasks", type=Path, default=Path("runs/continual/tasks/tasks.yaml"), help="YAML file of tasks"
    )
    for task in read_tasks(parser.parse_args().tasks):
        if task.kind == "generate":
            print(f"{task.name}: {task.metrics[0]} {majority(task):.1f}")


if __name__ == "__main__":
    main()
