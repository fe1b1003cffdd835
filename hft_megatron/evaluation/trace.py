"""The TRACE benchmark's sequence: its tasks in their order, with the length of training and the score of each.

Facts of arXiv:2310.06762 and of its code's ``train_seq_naive.sh`` and ``evaluations``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hft_megatron.errors import UserError
from hft_megatron.evaluation.tasks import Split, Task

LEARNING_RATE = 1e-5
"""Learning rate of every task, constant and without a warm-up."""
GLOBAL_BATCH_SIZE = 256
SPLITS: tuple[Split, ...] = ("train", "eval", "test")


@dataclass(frozen=True, kw_only=True)
class TraceTask:
    """TRACE's own settings of one task."""

    epochs: int
    metric: str = "exact_match"
    """The headline measure."""
    extract: str = "whole"
    max_new_tokens: int = 512


SHORT = 16
"""Tokens that suffice where a longer answer is wrong anyway, or its first letter decides: the score equals that of
TRACE's 512 generated tokens."""
TRACE: Mapping[str, TraceTask] = {
    "C-STANCE": TraceTask(epochs=5, max_new_tokens=SHORT),
    "FOMC": TraceTask(epochs=3, max_new_tokens=SHORT),
    "MeetingBank": TraceTask(epochs=7, metric="rouge_l"),
    "Py150": TraceTask(epochs=5, metric="code_similarity"),
    "ScienceQA": TraceTask(epochs=3, extract="regex:(?s)^.", max_new_tokens=SHORT),  # the letter; reasons follow it
    "NumGLUE-cm": TraceTask(epochs=5, max_new_tokens=SHORT),
    "NumGLUE-ds": TraceTask(epochs=5, max_new_tokens=SHORT),
    "20Minuten": TraceTask(epochs=7, metric="sari"),
}
"""In the order of training."""


def find_trace(option: str, folder: Path) -> tuple[Task, ...]:
    """The tasks of a folder like TRACE's, in TRACE's order, each as the evaluation of its test.json.

    Each of TRACE's names is a folder with train.json, eval.json and test.json; other folders, such as Lima, are not
    part of the sequence. Raises UserError for a folder without tasks, and for a task without one of the three files.
    """
    names = [name for name in TRACE if (folder / name).is_dir()]
    if not names:
        lists = sorted(folder.glob("*.yaml"))
        fix = "it must have folders such as C-STANCE and FOMC"
        fix = f"give {lists[0]}, if that is the list of tasks" if lists else fix
        raise UserError(f"{option} {folder} has none of TRACE's tasks; {fix}.")
    for name in names:
        for split in SPLITS:
            if not (folder / name / f"{split}.json").is_file():
                raise UserError(
                    f"{option} {folder}: the task {name} has no {split}.json; add it, or move the folder {name} "
                    f"away to do without the task."
                )
    return tuple(_evaluation(name, folder, f"{option} {folder / name}") for name in names)


def _evaluation(name: str, folder: Path, place: str) -> Task:
    """Prompts are unchanged, and answers the likeliest tokens, where TRACE draws them at temperature 0.1."""
    facts = TRACE[name]
    return Task(
        name=name,
        kind="generate",
        files=(name,),
        prompt="prompt",
        target="answer",
        extract=facts.extract,
        extract_target=facts.extract,
        max_new_tokens=facts.max_new_tokens,
        cut_long_prompts=True,
        metrics=(facts.metric,),
        place=place,
        folder=folder,
    )
