"""The made tasks are what they say, and a rule decides each answer. Run: pytest tests/tools/test_continual_tasks.py"""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from majority import majority
from make_base import training_row
from make_tasks import CLASS_OF, PLAIN, SIDES, SPLITS, TASKS, make_task, write_tasks

from hft_megatron.errors import UserError
from hft_megatron.evaluation.matrix import Column, ScoreMatrix
from hft_megatron.evaluation.task_files import read_tasks

SIZES = (40, 10, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tasks"
    write_tasks(folder, 1, SIZES)
    return folder


def rows_of(folder: Path, task: str, split: str) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = json.loads((folder / task / f"{split}.json").read_text(encoding="utf-8"))
    return rows


def test_the_folder_has_traces_shape_and_its_tasks_can_be_evaluated_as_a_sequence(folder: Path) -> None:
    for task in TASKS:
        assert [len(rows_of(folder, task, split)) for split in SPLITS] == list(SIZES)
        assert {tuple(row) for row in rows_of(folder, task, "train")} == {("prompt", "answer")}
    *tasks, general = read_tasks(folder / "tasks.yaml")
    assert [task.name for task in tasks] == list(TASKS)
    assert [task.paths() for task in tasks] == [(folder / name / "test.json",) for name in TASKS]
    ScoreMatrix([Column(name=task.name, digest=task.digest, measure=task.metrics[0]) for task in tasks])
    assert (general.name, general.metrics) == ("general", ("bits_per_byte",))
    with pytest.raises(UserError, match="the task general has the measure bits_per_byte"):
        ScoreMatrix([Column(name="general", digest="", measure=general.metrics[0])])


def test_the_same_seed_makes_the_same_rows_and_another_seed_others(folder: Path) -> None:
    for task in TASKS:
        made = make_task(task, 1, SIZES)
        assert made == {split: rows_of(folder, task, split) for split in SPLITS}
        assert made != make_task(task, 2, SIZES)


def test_no_prompt_is_there_twice(folder: Path) -> None:
    prompts = [row["prompt"] for task in TASKS for split in SPLITS for row in rows_of(folder, task, split)]
    assert len(set(prompts)) == len(prompts) == len(TASKS) * sum(SIZES)


def answer_by_rule(task: str, prompt: str) -> str:
    """Read off the prompt, in another way than the one that made it."""
    words = prompt.replace(".", " .").replace(",", " ,").split()
    if task in ("attitude", "policy"):
        order = ("for", "against", "neutral") if task == "attitude" else ("against", "for", "neutral")
        said = [side for word in words for side, verbs in SIDES.items() if word in verbs]
        return "ABC"[order.index(said[-1])]
    if task in ("sum", "difference"):
        one, other = (int(word) for word in words if word.isdigit())
        return str(one + other if task == "sum" else one - other)
    if task == "science":
        noun = next(word for word in words if word in CLASS_OF)
        letter = next(line[0] for line in prompt.splitlines() if line.endswith(f". {CLASS_OF[noun]}"))
        article = "an" if CLASS_OF[noun] == "animal" else "a"
        return f"{letter}\nThe {noun} is {article} {CLASS_OF[noun]}."
    if task == "minutes":
        text = prompt.split("\n")[2]
        return text.split(" Agreed.")[0].split("Next. ")[-1]
    if task == "code":
        one, other, result = (words[index] for index in (3, 5, 9))
        return f"return {result} , {other} , {one}"
    text = prompt.split("\n")[2].split(",")[0]
    return " ".join(PLAIN.get(word, word) for word in text.split()) + "."


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_follows_from_the_prompt(task: str, folder: Path) -> None:
    for row in rows_of(folder, task, "train"):
        assert answer_by_rule(task, row["prompt"]) == row["answer"], row


def test_the_base_is_taught_none_of_the_tasks_prompts() -> None:
    heads = {row["prompt"].split("\n")[0] for task in TASKS for row in make_task(task, 1, (20, 0, 0))["train"]}
    rng = random.Random(1)
    rows = [training_row(rng) for _ in range(300)]
    assert any("Repeat" in row["prompt"] for row in rows)
    assert all(row["answer"] for row in rows)
    assert not heads & {row["prompt"].split("\n")[0] for row in rows}


def test_the_best_constant_answer_is_the_most_frequent_class_where_answers_are_classes(folder: Path) -> None:
    tasks = {task.name: task for task in read_tasks(folder / "tasks.yaml")}
    for name in ("attitude", "policy", "science"):
        ((_, count),) = Counter(row["answer"][0] for row in rows_of(folder, name, "test")).most_common(1)
        assert majority(tasks[name]) == 100 * count / SIZES[-1]
    assert 0 < majority(tasks["minutes"]) < 60
