"""What a prompt and its answers share stands there once, in whatever form a pair is written.

Run: pytest tests/data/formats
"""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed: make install brings it")

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hft_megatron.config.data import DataConfig
from hft_megatron.data.formats.preference import Preference, parse_preference
from hft_megatron.data.loading import training_pairs
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from tests.support.data_files import write_rows
from tests.support.tokenizers import make_byte_level

SYSTEM, ASK, AGAIN = ({"role": role, "content": text} for role, text in (("system", "s"), ("user", "a"), ("user", "z")))
GOOD, BAD = {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}
ASKED = "\n\nHuman: Name a bird.\n\nAssistant:"

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\ufdd0\ufdd1\ufdd2\r"), max_size=8)
ANSWER = TEXT.filter(str.strip)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(None, make_byte_level(tmp_path_factory.mktemp("tokenizer")))


def tokens(path: Path, tokenizer: Tokenizer, rows: list[dict[str, Any]]) -> list[tuple[bytes, bytes]]:
    """Ids and mask of both halves of every row, as one value for each row."""
    options = DataConfig(train_data_path=(str(write_rows(path / "a.jsonl", rows)),))
    pairs = training_pairs(options, tokenizer, 4096, "error")
    assert pairs is not None
    halves = [tuple(array.tobytes() for array in pairs.answers.example(half)) for half in range(2 * len(rows))]
    return [(b"".join(halves[2 * row]), b"".join(halves[2 * row + 1])) for row in range(len(rows))]


@FUZZ
@given(
    turns=st.lists(TEXT, min_size=1, max_size=4).map(lambda texts: texts[: len(texts) - 1 + len(texts) % 2]),
    system=st.none() | ANSWER,
    answers=st.tuples(ANSWER, ANSWER),
)
def test_every_form_of_messages_has_the_tokens_of_three_parts(
    tmp_path: Path, tokenizer: Tokenizer, turns: list[str], system: str | None, answers: tuple[str, str]
) -> None:
    assume(answers[0] != answers[1])
    prompt = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)]
    prompt = ([{"role": "system", "content": system}] if system else []) + prompt
    chosen, rejected = ({"role": "assistant", "content": text} for text in answers)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[turn["role"]], "value": turn["content"]} for turn in [*prompt, chosen, rejected]]
    history = list(zip(turns[:-1:2], turns[1::2], strict=True))
    rows = [
        {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]},
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
        {"prompt": prompt, "chosen": [*prompt, chosen], "rejected": [*prompt, rejected]},
        {"prompt": prompt[-1:], "chosen": [*prompt, chosen], "rejected": [*prompt, rejected]},
        {"prompt": prompt, "chosen": [prompt[-1], chosen], "rejected": [prompt[-1], rejected]},
        {"prompt": turns[-1], "chosen": [*prompt, chosen], "rejected": [*prompt, rejected]},
        {"chosen": [*prompt, chosen], "rejected": [*prompt, rejected]},
        {"conversations": sharegpt[:-2], "chosen": sharegpt[-2], "rejected": sharegpt[-1]},
        {"conversations": sharegpt[:-2], "chosen": chosen, "rejected": rejected},
        {"chosen": sharegpt[:-1], "rejected": [*sharegpt[:-2], sharegpt[-1]]},
        {"messages": prompt, "chosen": chosen, "rejected": rejected},
        {"instruction": turns[-1], "history": history, "chosen": answers[0], "rejected": answers[1], "system": system},
    ]
    assert len(set(tokens(tmp_path, tokenizer, rows))) == 1


@FUZZ
@given(question=ANSWER, answers=st.tuples(ANSWER, ANSWER), earlier=st.booleans())
def test_every_form_of_texts_has_the_tokens_of_three_parts(
    tmp_path: Path, tokenizer: Tokenizer, question: str, answers: tuple[str, str], earlier: bool
) -> None:
    before = "\n\nHuman: hi\n\nAssistant: hello" if earlier else ""
    prompt = f"{before}\n\nHuman: {question}\n\nAssistant:"
    assume(answers[0] != answers[1])
    whole = [prompt + answer for answer in answers]
    rows = [
        {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
        {"prompt": prompt, "chosen": whole[0], "rejected": whole[1]},
        {"prompt": question, "chosen": whole[0], "rejected": whole[1]},
        {"prompt": "", "chosen": whole[0], "rejected": whole[1]},
        {"chosen": whole[0], "rejected": whole[1]},
    ]
    found = tokens(tmp_path, tokenizer, rows)
    # A question that all of the text begins with, such as a line end, is taken off as it stands.
    assert len(set(found if not prompt.startswith(question) else [*found[:2], *found[3:]])) == 1


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, "given"),
        ({"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "stripped"),
        ({"prompt": [ASK], "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]}, "stripped"),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "found"),
        ({"prompt": "a", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "found"),
        ({"prompt": "Say ", "chosen": "b", "rejected": "c"}, "given"),
        ({"prompt": "Say ", "chosen": "Say b", "rejected": "Say c"}, "stripped"),
        ({"prompt": "Say ", "chosen": "Say b", "rejected": "c"}, "in one answer"),
        ({"prompt": " ", "chosen": " b", "rejected": " c"}, "given"),
        ({"prompt": "Name a bird.", "chosen": f"{ASKED} Owl.", "rejected": f"{ASKED} Oak."}, "stripped"),
        ({"prompt": ASKED.strip(), "chosen": f"{ASKED} Owl.", "rejected": f"{ASKED} Oak."}, "stripped"),
        ({"prompt": "Human: Name a bird.", "chosen": f"{ASKED} Owl.", "rejected": f"{ASKED} Oak."}, "stripped"),
        ({"prompt": "a bird", "chosen": f"{ASKED} Owl.", "rejected": f"{ASKED} Oak."}, "given"),
        ({"prompt": "a", "chosen": f"{ASKED} Owl.", "rejected": f"{ASKED} Oak."}, "given"),
        ({"prompt": "Hi", "chosen": "Hi! How can I help?", "rejected": "High five."}, "given"),
        ({"prompt": "Hi", "chosen": "Hi there!", "rejected": "Hi you!"}, "in both answers"),
        (
            {"prompt": "Good morning!", "chosen": "Good morning! Tea?", "rejected": "Good morning! No."},
            "in both answers",
        ),
        (
            {
                "prompt": "Tell me what a cat is",
                "chosen": "Tell me what a cat isn't",
                "rejected": "Tell me what a cat is",
            },
            "in one answer",
        ),
        (
            {
                "prompt": "Tell me what a cat is",
                "chosen": "Tell me what a cat is An animal",
                "rejected": "Tell me what a cat is\nA fish",
            },
            "stripped",
        ),
        (
            {"prompt": "What is a cat, dear?", "chosen": "What is a cat, dear?A", "rejected": "What is a cat, dear?B"},
            "stripped",
        ),
        ({"prompt": "Say it: \n", "chosen": "Say it: a", "rejected": "Say it: \nb"}, "stripped"),
        ({"prompt": "Say it: \n", "chosen": "Say it: a", "rejected": "b"}, "in one answer"),
        ({"prompt": "Hi  ", "chosen": "Hi you!", "rejected": "Hi there!"}, "in both answers"),
        ({"prompt": "2+2=", "chosen": "2+2=4", "rejected": "2+2=5"}, "stripped"),
        ({"prompt": "a fish", "chosen": f"{ASKED} Owl.", "rejected": f"{ASKED} Oak."}, "given"),
        ({"chosen": f"{ASKED} Owl.", "rejected": f"{ASKED} Oak."}, "found"),
    ],
)
def test_a_pair_says_where_its_prompt_was(row: dict[str, Any], form: str) -> None:
    pair = parse_preference(row, "x:1")
    assert pair.problem is None
    assert pair.form == form


@pytest.mark.parametrize("end", [" ", "\n", "  \n\t"])
def test_white_space_at_the_end_of_a_prompt_is_that_of_the_answers_that_repeat_it(end: str) -> None:
    question = "What is the first of these?"
    row = {"prompt": f"{question}{end}", "chosen": f"{question}\n\nOne.", "rejected": f"{question} Two."}
    pair = parse_preference(row, "x:1")
    assert pair == Preference(place="x:1", prompt=question, chosen="\n\nOne.", rejected=" Two.", form="stripped")


@pytest.mark.parametrize("prompt", ["Hi", "Hi!", "Good morning!"])
def test_an_answer_that_greets_back_stays_whole(prompt: str) -> None:
    for chosen, rejected in ((f"{prompt} Tea?", f"{prompt} No."), (f"{prompt}gh five.", f"{prompt}\n\nWell.")):
        pair = parse_preference({"prompt": prompt, "chosen": chosen, "rejected": rejected}, "x:1")
        assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, rejected)


def test_a_transcript_is_cut_behind_the_last_turn_that_both_begin_and_not_within_a_word() -> None:
    pair = parse_preference({"chosen": f"{ASKED} Owlet.", "rejected": f"{ASKED} Owl."}, "x:1")
    assert pair == Preference(place="x:1", prompt=ASKED, chosen=" Owlet.", rejected=" Owl.", form="found")
    longer = f"{ASKED} Owl.{ASKED}"
    pair = parse_preference({"chosen": f"{longer} Owl", "rejected": f"{longer} Oak"}, "x:1")
    assert (pair.prompt, pair.chosen, pair.rejected) == (longer, " Owl", " Oak")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": f"{ASKED} Owl.{ASKED} x", "rejected": f"{ASKED} Oak.{ASKED} x"}, "a turn of the human's is in one"),
        ({"chosen": f"{ASKED} Owl.", "rejected": f"\n\nHuman: Tree?{ASKED} Oak."}, "begin differently"),
        (
            {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [BAD]},
            "`chosen` repeats the prompt, and `rejected` doesn't",
        ),
        (
            {"prompt": [ASK], "chosen": GOOD, "rejected": [ASK, BAD]},
            "`rejected` repeats the prompt, and `chosen` doesn't",
        ),
        ({"prompt": "q", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "`prompt` is none of the messages"),
        ({"chosen": [ASK, GOOD], "rejected": [AGAIN, BAD]}, "begin differently"),
    ],
)
def test_answers_that_share_no_prompt_are_a_problem_of_the_pair(row: dict[str, Any], problem: str) -> None:
    assert problem in (parse_preference(row, "x:1").problem or "")


def test_the_log_counts_the_pairs_whose_prompts_were_taken_off_or_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "Say ", "chosen": "Say b", "rejected": "Say c"},
        {"chosen": f"{ASKED} Owl.", "rejected": f"{ASKED} Oak."},
        {"prompt": "Say ", "chosen": "Say b", "rejected": "c"},
        {"prompt": "Hi", "chosen": "Hi you", "rejected": "Hi"},
    ]

    def described(count: int) -> str:
        path = write_rows(tmp_path / "a.jsonl", [*rows[:count], {"prompt": "x", "chosen": "y", "rejected": "z"}])
        pairs = training_pairs(DataConfig(train_data_path=(str(path),)), tokenizer, 512, "error")
        assert pairs is not None
        return pairs.describe()[0]

    assert described(0).endswith(" dropped (sequence length 512)")
    line = described(5)
    assert ", 2 with a prompt that both answers repeated, where it was removed" in line
    assert ", 1 with the common beginning of both answers as their prompt" in line
    assert ", 1 with a prompt that only one answer repeats, which was left as it is" in line
    assert ", 1 with a prompt of a few words that both answers begin with, which were left as they are" in line
