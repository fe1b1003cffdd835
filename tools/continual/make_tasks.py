"""Makes a sequence of eight tasks of TRACE's shape that a LLaMA of a million parameters learns in seconds.

Run: ``python tools/continual/make_tasks.py [--output runs/continual/tasks] [--seed 1] [--rows 500 100 100]``. The
folder has, as TRACE's, ``<task>/{train,eval,test}.json``, arrays of ``{"prompt", "answer"}``; ``general.txt``, texts of
the base model's own language, to measure what the sequence does to it; ``sequence.yaml`` and ``general.yaml``, which
``hft-megatron continual`` reads, and ``tasks.yaml``, which ``hft-megatron evaluate`` does. No prompt is there twice, in
no split. Pure Python, from the seed alone.

The tasks are made up, and each replaces one of TRACE's: a choice of a letter (attitude, policy), a
sentence to be found and copied (minutes), the next line of code (code), a letter with its reason (science), sums and
differences told in words under one and the same instruction (sum, difference), and a rewriting (simple). They share
words, people and letters, and give them other meanings, so that one disturbs the other: A in ``attitude`` is B in
``policy``. The base (make_base.py) knows the language: the verbs that are for and against a thing, the animals, the
plain word for a hard one, and arithmetic; it has never seen the tasks' rules.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, str]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("""
    Alda Amos Bela Bram Cleo Cora Dario Dora Elias Emil Finn Greta Hanna Hugo Ivo Jonas Karl Kira Leon Lotte Mara Milo
    Nadia Nils Oscar Petra Rosa Selma Thea Vera
""")
CLASSES = {
    "animal": _words("cat dog horse goat crow mule heron lizard pony rabbit"),
    "food": _words("apple bread cheese honey plum rice soup carrot egg cake"),
    "tool": _words("hammer knife ladder rope spoon needle broom saw drill key"),
    "plant": _words("rose oak fern tulip pine moss reed ivy lily birch"),
}
CLASS_OF = {noun: kind for kind, nouns in CLASSES.items() for noun in nouns}
NOUNS = tuple(CLASS_OF)
SIDES = {
    "for": _words("loves likes praises defends admires trusts"),
    "against": _words("hates fears blames attacks dislikes doubts"),
    "neutral": _words("sees meets paints counts names draws"),
}
"""Verbs by the side that they take."""
ADJECTIVES = _words("red old small white heavy round slow soft")
PLAIN_VERBS = {
    "purchases": "buys",
    "conceals": "hides",
    "repairs": "mends",
    "observes": "watches",
    "transports": "brings",
    "requires": "needs",
}
PLAIN_ADJECTIVES = {
    "enormous": "big",
    "ancient": "grey",
    "rapid": "fast",
    "delicate": "weak",
    "costly": "dear",
    "minute": "tiny",
}
PLAIN = PLAIN_VERBS | PLAIN_ADJECTIVES
"""Plain words of hard ones."""
VERBS = (*SIDES["for"], *SIDES["against"], *SIDES["neutral"], *PLAIN_VERBS.values())
LETTERS = "ABC"


def sentence(rng: random.Random) -> str:
    """One sentence about a person and a thing, as in every text of this language."""
    return f"{rng.choice(NAMES)} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}."


def fact(rng: random.Random) -> str:
    """One sentence of the language's facts."""
    name, noun, hard = rng.choice(NAMES), rng.choice(NOUNS), rng.choice(tuple(PLAIN))
    side = rng.choice(tuple(SIDES))
    return rng.choice(
        (
            f"The {noun} is {_with_article(CLASS_OF[noun])}.",
            f"{name} {rng.choice(SIDES[side])} the {noun}, so {name} is {side}.",
            f"For {hard} one also says {PLAIN[hard]}.",
        )
    )


def general_text(rng: random.Random, sentences: int) -> str:
    """Sentences and facts, one after the other."""
    return " ".join(rng.choice((sentence, fact))(rng) for _ in range(sentences))


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def attitude(rng: random.Random) -> Row:
    """The side that somebody takes: for is A, against B, neutral C."""
    side = rng.choice(tuple(SIDES))
    text = f"{rng.choice(NAMES)} {rng.choice(SIDES[side])} the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}."
    prompt = f"What is the attitude of the text? Choose A, B or C.\nText:\n{text}\nAnswer:"
    return {"prompt": prompt, "answer": LETTERS[tuple(SIDES).index(side)]}


def policy(rng: random.Random) -> Row:
    """The side in the second of two sentences: against is A, for B, neutral C."""
    side = rng.choice(tuple(SIDES))
    text = f"{sentence(rng)} {rng.choice(NAMES)} {rng.choice(SIDES[side])} the {rng.choice(NOUNS)}."
    prompt = f"What is the policy of the text? Choose A, B or C.\nText:\n{text}\nAnswer:"
    return {"prompt": prompt, "answer": LETTERS[("against", "for", "neutral").index(side)]}


def minutes(rng: random.Random) -> Row:
    """The sentence among three that is followed by the word agreed."""
    sentences = [sentence(rng) for _ in range(3)]
    agreed = rng.randrange(3)
    said = [f"{one} {'Agreed.' if number == agreed else 'Next.'}" for number, one in enumerate(sentences)]
    prompt = f"Write a summary of the meeting.\nText:\n{' '.join(said)}\nAnswer:"
    return {"prompt": prompt, "answer": sentences[agreed]}


def code(rng: random.Random) -> Row:
    """The line that ends a function of two arguments: what it returns depends on the operator."""
    name, (one, other) = rng.choice(NAMES), rng.sample(NOUNS, 2)
    operator, result = rng.choice((("+", "sum"), ("-", "rest"), ("*", "area")))
    lines = [f"def {name} ( {one} , {other} ) :", f"{result} = {one} {operator} {other}"]
    return {"prompt": f"{' <EOL> '.join(lines)} <EOL>", "answer": f"return {result} , {other} , {one}"}


def science(rng: random.Random) -> Row:
    """The class of a thing, by its letter, and the reason."""
    noun = rng.choice(NOUNS)
    choices = "".join(f"{letter}. {kind}\n" for letter, kind in zip("ABCD", CLASSES, strict=True))
    question = f"{rng.choice(NAMES)} has a {rng.choice(ADJECTIVES)} {noun}. What is it?"
    prompt = f"Choose an answer and give your reasons.\n{question}\n{choices}Answer:"
    kind = CLASS_OF[noun]
    return {"prompt": prompt, "answer": f"{'ABCD'[tuple(CLASSES).index(kind)]}\nThe {noun} is {_with_article(kind)}."}


MATH = "Solve the math problem.\nQuestion:\n{}\nAnswer:"


def addition(rng: random.Random) -> Row:
    """A sum of two numbers up to 9."""
    name, noun = rng.choice(NAMES), rng.choice(NOUNS)
    one, other = rng.randint(1, 9), rng.randint(1, 9)
    text = f"{name} has {one} of the {noun} and then finds {other} more. How many has {name}?"
    return {"prompt": MATH.format(text), "answer": str(one + other)}


def difference(rng: random.Random) -> Row:
    """The remainder of a number up to 9."""
    name, noun = rng.choice(NAMES), rng.choice(NOUNS)
    one = rng.randint(2, 9)
    other = rng.randint(1, one - 1)
    text = f"{name} has {one} of the {noun} and then sells {other} again. How many has {name}?"
    return {"prompt": MATH.format(text), "answer": str(one - other)}


def simple(rng: random.Random) -> Row:
    """Hard words become plain ones, and the part after the comma is dropped."""
    name, noun, other = rng.choice(NAMES), rng.choice(NOUNS), rng.choice(NOUNS)
    verb, adjective = rng.choice(tuple(PLAIN_VERBS)), rng.choice(tuple(PLAIN_ADJECTIVES))
    more = f"which {rng.choice(NAMES)} {rng.choice(SIDES['neutral'])} beside the {other}"
    prompt = f"Write a simple version of the text.\nText:\n{name} {verb} the {adjective} {noun}, {more}.\nAnswer:"
    return {"prompt": prompt, "answer": f"{name} {PLAIN[verb]} the {PLAIN[adjective]} {noun}."}


@dataclass(frozen=True, kw_only=True)
class TaskRule:
    """One task of the sequence, and its scoring."""

    make: Callable[[random.Random], Row]
    measure: str = "exact_match"
    max_new_tokens: int = 4
    extract: str = "whole"


FIRST_LETTER = "regex:(?s)^."
TASKS: dict[str, TaskRule] = {
    "attitude": TaskRule(make=attitude),
    "policy": TaskRule(make=policy),
    "minutes": TaskRule(make=minutes, measure="rouge_l", max_new_tokens=16),
    "code": TaskRule(make=code, measure="code_similarity", max_new_tokens=16),
    "science": TaskRule(make=science, max_new_tokens=16, extract=FIRST_LETTER),
    "sum": TaskRule(make=addition),
    "difference": TaskRule(make=difference),
    "simple": TaskRule(make=simple, measure="sari", max_new_tokens=16),
}
"""Rules in the order of TRACE's tasks that they replace."""
SPLITS = ("train", "eval", "test")


def make_task(name: str, seed: int, sizes: tuple[int, ...]) -> dict[str, list[Row]]:
    """The rows of each split, without duplicate prompts."""
    rng, seen = random.Random(f"{name} {seed}"), set[str]()
    rows: list[Row] = []
    while len(rows) < sum(sizes):
        row = TASKS[name].make(rng)
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            rows.append(row)
    splits = iter(rows)
    return {split: [next(splits) for _ in range(size)] for split, size in zip(SPLITS, sizes, strict=True)}


DOCUMENT_END = "<|endoftext|>"


def write_tasks(folder: Path, seed: int, sizes: tuple[int, ...]) -> None:
    """Writes the folder, which must be new."""
    folder.mkdir(parents=True)
    sequence: list[dict[str, Any]] = []
    tasks: list[dict[str, Any]] = []
    for name, rule in TASKS.items():
        (folder / name).mkdir()
        for split, rows in make_task(name, seed, sizes).items():
            (folder / name / f"{split}.json").write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
        entry: dict[str, Any] = {"kind": "generate", "files": name}
        entry |= {"prompt": "prompt", "target": "answer", "max_new_tokens": rule.max_new_tokens}
        entry |= {"metrics": rule.measure, "extract": rule.extract, "extract_target": rule.extract}
        data = str(folder / name / "train.json")  # looked for in the folder that the command is started in
        sequence.append({"name": name, "train_data_path": data, "evaluate": entry})
        tasks.append({"name": name, **entry})
    rng = random.Random(f"general {seed}")
    texts = [f"{general_text(rng, 6)}\n{DOCUMENT_END}\n" for _ in range(sizes[-1])]
    (folder / "general.txt").write_text("".join(texts), encoding="utf-8")
    general = {"name": "general", "kind": "text", "files": "general.txt", "separator": DOCUMENT_END}
    general["metrics"] = "bits_per_byte"
    for file, entries in (("sequence", sequence), ("general", [general]), ("tasks", [*tasks, general])):
        lines = [f"- {json.dumps(one)}\n" for one in entries]
        (folder / f"{file}.yaml").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Makes the tasks that the command line asks for."""
    parser = argparse.ArgumentParser(description="Make eight small tasks of TRACE's shape.")
    parser.add_argument("--output", type=Path, default=Path("runs/continual/tasks"), help="new folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs=3, default=(500, 100, 100), metavar=("TRAIN", "EVAL", "TEST"))
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} already exists; remove it, or name another folder")
    write_tasks(arguments.output, arguments.seed, tuple(arguments.rows))


if __name__ == "__main__":
    main()
