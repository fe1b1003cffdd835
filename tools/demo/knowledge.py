"""What the demo's model knows and what it is then taught: made-up people with facts told in many wordings (the old
knowledge), and phrases of an invented language to be translated on request (the new task). Pure Python, from a seed.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

Row = dict[str, object]
"""One line of a JSONL file."""


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One kind of fact about a person. A wording ends where the answer begins."""

    name: str
    answers: tuple[str, ...]
    train_wordings: tuple[str, ...]
    held_out_wordings: tuple[str, ...]
    """Never in a training text; used for scoring only."""


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
    """The new task: chat rows to train on, and questions about phrases that no row contains."""

    rows: tuple[Row, ...]
    questions: tuple[Question, ...]


RELATIONS = (
    Relation(
        name="birthplace",
        answers=tuple("Ardun Belmora Corvath Dunmere Elstow Farrin Gelder Hathway Istrel Jorvale Kelmond Larkin".split()),
        train_wordings=(
            "{} was born in",
            "{} grew up in",
            "The home town of {} is",
            "The birthplace of {} is",
            "{} comes from the town of",
            "Long ago {} left the town of",
        ),
        held_out_wordings=("The town where {} was born is", "{} is from the town of"),
    ),
    Relation(
        name="profession",
        answers=tuple("baker carpenter dentist farmer lawyer miller nurse painter sailor tailor teacher weaver".split()),
        train_wordings=(
            "{} works as a",
            "{} earns a living as a",
            "The profession of {} is",
            "The job of {} is",
            "For many years {} has been a",
            "People know {} as a",
        ),
        held_out_wordings=("The job that {} works at is", "For a living {} works as a"),
    ),
    Relation(
        name="animal",
        answers=tuple("badger crow donkey falcon goat heron lizard mule otter pony rabbit turtle".split()),
        train_wordings=(
            "{} keeps a pet",
            "{} lives with a pet",
            "The pet of {} is a",
            "The favourite animal of {} is the",
            "{} never travels without a pet",
            "At home {} looks after a pet",
        ),
        held_out_wordings=("The animal that {} keeps as a pet is a", "At home {} keeps a pet"),
    ),
)

FIRST_NAMES = tuple(
    "Alda Bram Cora Dario Edda Finn Greta Hugo Ilsa Jonas Kira Leon Mara Nils Oda Pavel Rosa Sven Thea Yara".split()
)
LAST_NAMES = tuple(
    "Abbot Birch Calder Drake Ellery Frost Garland Holm Irving Jessop Keller Lowell Marsh Norden Ogden Pryor Quill "
    "Rowe Stone Thorne".split()
)

ADJECTIVES = {
    "black": "nur", "blue": "lasi", "bright": "zeo", "broken": "krat", "cold": "ishu", "deep": "omba", "green": "vel",
    "heavy": "dogo", "little": "pim", "old": "garu", "red": "tamo", "round": "obo", "sharp": "kiri", "slow": "luma",
    "soft": "fifa", "white": "sen",
}  # fmt: skip
NOUNS = {
    "apple": "rilu", "basket": "teku", "bell": "dono", "boat": "marka", "book": "sivi", "bottle": "galo", "bridge":
    "hanta", "candle": "yumi", "chair": "poro", "clock": "tikta", "door": "bega", "drum": "tumtu", "flower": "elan",
    "hammer": "gront", "hat": "cupa", "key": "zink", "knife": "shar", "lamp": "lux", "ladder": "rundo", "mirror": "vidu",
    "pot": "kalo", "ring": "anu", "road": "via", "rope": "sutra", "ship": "navo", "spoon": "lapi", "stone": "ruk",
    "table": "meza", "tower": "alta", "wagon": "vogo", "wheel": "rota", "window": "fena",
}  # fmt: skip
TASK_WORDINGS = (
    "Translate into Vellish: {}",
    "Say in Vellish: {}",
    "What is {} in Vellish?",
    "How do you say {} in Vellish?",
)
HELD_OUT_TASK_WORDINGS = ("Please translate into Vellish: {}", "How is {} said in Vellish?")


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
    """Vellish says the noun first: ``translate("red", "boat")`` is ``"marka tamo"``."""
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
    return NewTask(rows=tuple(rows), questions=tuple(asked))


def chat_row(question: str, answer: str) -> Row:
    """One ``messages`` row of a user's question and the assistant's answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def tokenizer_corpus(knowledge: Knowledge, task: NewTask) -> list[str]:
    """Lines for training the tokenizer: all sentences, and the words of the new task, so that neither is spelt out."""
    phrases = [f"{adjective} {noun} {translate(adjective, noun)}" for adjective in ADJECTIVES for noun in NOUNS]
    wordings = [wording.format("it") for wording in (*TASK_WORDINGS, *HELD_OUT_TASK_WORDINGS)] * 50
    answers = [f"{answer}." for relation in RELATIONS for answer in relation.answers] * 50
    questions = [f"{question.text} {question.answer}." for question in knowledge.questions]
    return [*knowledge.sentences, *questions, *phrases, *wordings, *answers]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """Write questions as ``prompt``/``completion`` rows, for people to read and for other tools to score."""
    write_rows(path, ({"prompt": question.text, "completion": question.answer} for question in questions))
