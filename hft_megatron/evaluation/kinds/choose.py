"""Tasks with given answers: the model chooses the one that it finds most likely after the prompt."""

import math
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from hft_megatron.data.files.rows import Row
from hft_megatron.data.formats.conversations import kind_of
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import UserError
from hft_megatron.evaluation.columns import is_template, rendered, value_of
from hft_megatron.evaluation.examples import EvalExample, Generated, TaskExamples
from hft_megatron.evaluation.kinds.kind import Answer
from hft_megatron.evaluation.prompts import Cuts, Prompts
from hft_megatron.evaluation.task_rows import read_task_rows
from hft_megatron.evaluation.tasks import Task, TaskKind


class Choose:
    """See Kind."""

    name: TaskKind = "choose"
    default_metrics: tuple[str, ...] = ("accuracy",)

    def metrics(self) -> tuple[str, ...]:
        return ("accuracy", "accuracy_per_token", "accuracy_per_byte", "probability")

    def read(self, task: Task, tokenizer: Tokenizer, window: int) -> TaskExamples:
        rows = read_task_rows(task)
        prompts = Prompts(task, tokenizer, lambda row: _right_answer(task, row))
        solved = [choices_and_right_ones(task, row.row) for row in rows]
        questions = [prompts.question(row, number) for number, row in enumerate(rows)]
        answered = iter(
            tokenizer.encode_pieces(
                [
                    prompts.answered_pieces(question, choice)
                    for question, (choices, _) in zip(questions, solved, strict=True)
                    for choice in choices
                ]
            )
        )
        cuts = Cuts(task=task, begin=tokenizer.bos_id)
        what = f"the prompt and the longest choice have {{}} tokens, but the model predicts at most {window + 1}"
        examples = []
        for question, (choices, right) in zip(questions, solved, strict=True):
            row = question.row
            sequences = [next(answered) for _ in choices]
            for choice, (_, scored) in zip(choices, sequences, strict=True):
                if not scored.any():
                    raise UserError(f"{row.row.place}: the choice {choice!r} has no token to score; correct the row.")
                if scored[0]:
                    raise UserError(
                        f"{row.row.place}: the prompt is empty, so the first token of a choice cannot be scored: "
                        f"the tokenizer puts no begin token before it; give the row a prompt."
                    )
            # The prompt is the same before all choices, and is cut by the same.
            longest, prompt = max((len(ids), int(np.argmax(scored))) for ids, scored in sequences)
            surplus = cuts.surplus(row.row.place, longest, prompt, window + 1, what)
            facts = {"right": right, "bytes": [len(choice.encode()) for choice in choices], "choices": choices}
            examples.append(
                EvalExample(
                    place=row.name,
                    sequences=tuple(cuts.sequence(encoded, surplus) for encoded in sequences),
                    facts=facts,
                )
            )
        cuts.check()
        notes = [*_notes_on_repeats([_choices(task, row.row)[0] for row in rows]), *cuts.notes(len(rows))]
        return TaskExamples(examples=tuple(examples), notes=tuple(notes), counts=cuts.counts())

    def record(self, task: Task, example: EvalExample, answer: Answer) -> dict[str, Any]:
        assert not isinstance(answer, Generated)
        right = example.facts["right"]
        log_probs = [score.log_prob for score in answer]
        per_token = [score.log_prob / score.tokens for score in answer]
        per_byte = [score.log_prob / size for score, size in zip(answer, example.facts["bytes"], strict=True)]
        values = {
            "accuracy": float(_best(log_probs) in right),
            "accuracy_per_token": float(_best(per_token) in right),
            "accuracy_per_byte": float(_best(per_byte) in right),
            "probability": _share(log_probs, right),
        }
        return {
            "example": example.place,
            "prediction": _best(log_probs),
            "right": right,
            "choices": example.facts["choices"],
            "log_probs": log_probs,
            "tokens": [score.tokens for score in answer],
            "statistics": {name: [values[name], 1.0] for name in task.metrics},
        }


def _notes_on_repeats(choices: Sequence[Sequence[str]]) -> list[str]:
    """One line where rows have a text twice, or none."""
    repeats = sum(len(set(texts)) < len(texts) for texts in choices)
    return [f"choices of the same text count as one, in {repeats:,} of {len(choices):,} rows"] if repeats else []


def _best(values: Sequence[float]) -> int:
    """Index of the first highest value."""
    return max(range(len(values)), key=values.__getitem__)


def _share(log_probs: Sequence[float], right: Sequence[int]) -> float:
    """The right choices' share of all choices' probability."""
    most = max(log_probs)
    weights = [math.exp(log_prob - most) for log_prob in log_probs]
    return math.fsum(weights[index] for index in right) / math.fsum(weights)


def _right_answer(task: Task, row: Row) -> str:
    choices, right = choices_and_right_ones(task, row)
    return choices[right[0]]


def choices_and_right_ones(task: Task, row: Row) -> tuple[list[str], list[int]]:
    """The different texts of the choices, at least two, and the indices of the right ones, at least one.

    A text that is there twice, as in some rows of MMLU, is one choice: between two, rounding would decide.
    Raises UserError naming the row's place for an empty choice, and for an answer that is none of them.
    """
    choices, labels = _choices(task, row)
    for number, choice in enumerate(choices, start=1):
        if not choice.strip():
            raise UserError(f"{row.place}: choice {number} of {len(choices)} is empty; correct the row.")
    texts = list(dict.fromkeys(choices))
    if len(texts) < 2:
        raise UserError(f"{row.place}: `choices` needs at least two texts that differ; correct the row.")
    if task.answer is None:
        if labels is None:
            raise UserError(
                f"{task.place}: the task {task.name} has no `answer`, which says which of its choices is right; add it."
            )
        right = labels
    else:
        value = value_of(task.answer, "answer", row)
        answers = value if isinstance(value, list) else [value]
        right = sorted({_index_of(answer, choices, row) for answer in answers})
    if not right:
        raise UserError(f"{row.place}: no choice is marked as right; correct the row.")
    return texts, sorted({texts.index(choices[index]) for index in right})


def _choices(task: Task, row: Row) -> tuple[list[str], list[int] | None]:
    """The choices, and the right ones where the data mark them, as TruthfulQA's do."""
    if len(task.choices) > 1:
        return [rendered(each, "choices", row) if is_template(each) else each for each in task.choices], None
    value = value_of(task.choices[0], "choices", row)
    labels = None
    if isinstance(value, dict) and value.keys() >= {"choices", "labels"}:
        value, labels = value["choices"], value["labels"]
    if not isinstance(value, list) or not all(isinstance(choice, (str, int, float)) for choice in value):
        raise UserError(f"{row.place}: `choices` is {kind_of(value)}, but it must be a list of texts.")
    if labels is None:
        return [str(choice) for choice in value], None
    if not isinstance(labels, list) or len(labels) != len(value) or any(label not in (0, 1) for label in labels):
        raise UserError(f"{row.place}: `labels` must be a list with 0 or 1 for each of the {len(value)} choices.")
    return [str(choice) for choice in value], [index for index, label in enumerate(labels) if label]


def _index_of(answer: Any, choices: Sequence[str], row: Row) -> int:
    """Index of the choice with this text, else of this number or letter."""
    texts = [choice.strip() for choice in choices]
    number = answer if isinstance(answer, int) else len(choices)
    if isinstance(answer, str):
        word = answer.strip()
        number = int(word) if word.isascii() and word.isdigit() else len(choices)
        if word in texts:
            if number < len(choices) and texts[number] != word:
                raise UserError(
                    f"{row.place}: the answer {word} is the text of choice {texts.index(word)} and the number of "
                    f"another; write its letter, such as {string.ascii_uppercase[texts.index(word)]}."
                )
            return texts.index(word)
        if len(word) == 1 and word.upper() in string.ascii_uppercase:
            number = string.ascii_uppercase.index(word.upper())
    if 0 <= number < len(choices):
        return int(number)
    shown = ", ".join(f"{choice[:30]!r}" for choice in choices[:5]) + ", ..." * (len(choices) > 5)
    last = string.ascii_uppercase[: len(choices)][-1]
    raise UserError(
        f"{row.place}: the answer {answer!r} is none of the {len(choices)} choices ({shown}): neither a text of them, "
        f"nor a number from 0 to {len(choices) - 1}, nor a letter from A to {last}."
    )
