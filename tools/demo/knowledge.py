"""The knowledge of the demo's model and its new task: made-up people with facts told in many wordings (the old
knowledge), and phrases of an invented language to be translated on request (the new task). Pure Python, from a seed.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from words import (
    ADJECTIVES,
    FIRST_NAMES,
    HELD_OUT_TASK_WORDINGS,
    LAST_NAMES,
    NOUNS,
    RELATIONS,
    TASK_WORDINGS,
)

Row = dict[str, Any]
"""One line of a JSONL file."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One scored question: the model has to continue ``text`` with exactly ``answer``."""

    text: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """The old knowledge: training sentences, and questions in wordings that no sentence uses."""

    people: int
    facts: int
    sentences: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True, kw_only=True)
class NewTask:
    """The new task: chat rows to train on, also as preferences, and questions about phrases that no row contains."""

    rows: tuple[Row, ...]
    pairs: tuple[Row, ...]
    """For each row, its answer and one with the two words swapped."""
    questions: tuple[Question, ...]


def make_knowledge(seed: int, people: int) -> Knowledge:
    """Draw ``people`` people with one answer per relation; every fact is told once per training wording.

    The questions ask each fact in one of its held-out wordings, in turn.
    """
    assert people <= len(FIRST_NAMES) * len(LAST_NAMES), f"{people} people need more names"
    rng = random.Random(f"knowledge {seed}")
    names = rng.sample([f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES], people)
    sentences: list[str] = []
    questions: list[Question] = []
    for number, name in enumerate(names):
        for relation in RELATIONS:
            answer = rng.choice(relation.answers)
            sentences += [f"{wording.format(name)} {answer}." for wording in relation.train_wordings]
            held_out = relation.held_out_wordings[number % len(relation.held_out_wordings)]
            questions.append(Question(text=held_out.format(name), answer=answer))
    return Knowledge(
        people=people, facts=people * len(RELATIONS), sentences=tuple(sentences), questions=tuple(questions)
    )


def pretraining_rows(knowledge: Knowledge, seed: int, sentences_per_row: int, repeats: int) -> list[Row]:
    """Plain texts of ``sentences_per_row`` sentences each, as rows with an empty prompt.

    Every sentence occurs ``repeats`` times, each time beside other sentences, so that no neighbour gives a fact away.
    """
    rng = random.Random(f"pretraining {seed}")
    rows: list[Row] = []
    for _ in range(repeats):
        order = rng.sample(knowledge.sentences, len(knowledge.sentences))
        for start in range(0, len(order), sentences_per_row):
            rows.append({"prompt": "", "completion": " ".join(order[start : start + sentences_per_row])})
    return rows


def translate(adjective: str, noun: str) -> str:
    """The phrase in Vellish, which puts the noun first: ``translate("red", "boat")`` is ``"marka tamo"``."""
    return f"{NOUNS[noun]} {ADJECTIVES[adjective]}"


def make_new_task(seed: int, questions: int) -> NewTask:
    """Split all adjective-noun phrases into ``questions`` held-out ones and training rows in every training wording.

    A held-out phrase is in no row, but each of its two words is in many: the skill must be composed, not recalled.
    """
    rng = random.Random(f"new task {seed}")
    phrases = [(adjective, noun) for adjective in ADJECTIVES for noun in NOUNS]
    rng.shuffle(phrases)
    rows: list[Row] = [
        chat_row(wording.format(f"{adjective} {noun}"), translate(adjective, noun))
        for adjective, noun in phrases[questions:]
        for wording in TASK_WORDINGS
    ]
    asked = [
        Question(
            text=HELD_OUT_TASK_WORDINGS[number % len(HELD_OUT_TASK_WORDINGS)].format(f"{adjective} {noun}"),
            answer=translate(adjective, noun),
        )
        for number, (adjective, noun) in enumerate(phrases[:questions])
    ]
    return NewTask(rows=tuple(rows), pairs=tuple(pair_row(row) for row in rows), questions=tuple(asked))


def chat_row(question: str, answer: str) -> Row:
    """One ``messages`` row of a user's question and the assistant's answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pair_row(row: Row) -> Row:
    """A ``chat_row`` as a preference: its answer is chosen, and its two words swapped are rejected."""
    question, answer = row["messages"]
    wrong = " ".join(reversed(answer["content"].split()))
    return {"prompt": [question], "chosen": [answer], "rejected": [{"role": "assistant", "content": wrong}]}


def tokenizer_corpus(knowledge: Knowledge) -> list[str]:
    """Lines for training the tokenizer: all sentences, and the words of the new task, so that neither is spelt out."""
    phrases = [f"{adjective} {noun} {translate(adjective, noun)}" for adjective in ADJECTIVES for noun in NOUNS]
    instructions = [wording.format("it") for wording in TASK_WORDINGS] * 50
    answers = [f"{answer}." for relation in RELATIONS for answer in relation.answers] * 50
    return [*knowledge.sentences, *phrases, *instructions, *answers]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """Write questions as ``prompt``/``completion`` rows, for people to read and for other tools to score."""
    write_rows(path, ({"prompt": question.text, "completion": question.answer} for question in questions))
