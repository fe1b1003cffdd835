"""Prompts and completions are texts, or messages as in TRL. Run: pytest tests/data/formats"""

from pathlib import Path
from typing import Any

import pytest

from hft_megatron.data.formats.completions import Completion, parse_input_output, parse_prompt_completion, parse_trace
from hft_megatron.data.formats.conversations import Chat
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.data_files import load, trained_texts, write_rows
from tests.support.tokenizers import make_byte_level

TURNS = [
    ("user", "1+1?"),
    ("assistant", "2"),
    ("user", "2+2?"),
    ("assistant", "4"),
    ("user", "Sure?"),
    ("assistant", "Y"),
]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]


@pytest.mark.parametrize("given", [1, 3, 5])
def test_of_messages_only_the_completion_is_learned(tmp_path: Path, given: int) -> None:
    tokenizer = load_tokenizer(None, make_byte_level(tmp_path / "tokenizer"), "chatml")
    rows = [{"prompt": MESSAGES[:given], "completion": MESSAGES[given:]}]
    dataset = load(write_rows(tmp_path / "rows.jsonl", rows), tokenizer)
    answers = [text for role, text in TURNS[given:] if role == "assistant"]
    assert trained_texts(dataset, tokenizer, 0, "chatml") == answers
    last = load(tmp_path / "rows.jsonl", tokenizer, loss_on="last")
    assert trained_texts(last, tokenizer, 0, "chatml") == ["Y"]
    whole = load(tmp_path / "rows.jsonl", tokenizer, loss_on="all")
    assert whole.example(0)[1].all()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": MESSAGES[:1], "completion": "2"}, "`prompt` is a list and `completion` is text; write both alike"),
        (
            {"prompt": "1+1?", "completion": MESSAGES[1:2]},
            "`prompt` is text and `completion` is a list; write both ali",
        ),
        (
            {"prompt": MESSAGES[:2], "completion": MESSAGES[3:]},
            "the last message of `prompt` is the assistant's, and `c",
        ),
        ({"prompt": [], "completion": MESSAGES}, "`prompt` is an empty list, but it must be a list of at least one"),
        ({"prompt": MESSAGES[:2], "completion": MESSAGES[2:3]}, "the conversation has no assistant turn"),
        ({"prompt": [{"role": "robot"}], "completion": MESSAGES}, "message 1 of `prompt` has the role 'robot'"),
    ],
)
def test_a_wrong_value_is_named(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^x:1: {sentence}"):
        parse_prompt_completion(row, "x:1")


SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("prompt", "completion", "given", "whole"),
    [
        (MESSAGES[:1], MESSAGES[:2], 1, MESSAGES[:2]),
        ([SYSTEM, *MESSAGES[:1]], MESSAGES[:2], 2, [SYSTEM, *MESSAGES[:2]]),
        (MESSAGES[:1], [SYSTEM, *MESSAGES[:2]], 2, [SYSTEM, *MESSAGES[:2]]),
        (MESSAGES[2:3], MESSAGES, 3, MESSAGES),
        (MESSAGES[:3], MESSAGES, 3, MESSAGES),
        (MESSAGES[:2], MESSAGES[1:4], 2, MESSAGES[:4]),
        (MESSAGES[:1], MESSAGES, 1, MESSAGES),
    ],
)
def test_messages_that_the_completion_repeats_stand_there_once(
    prompt: list[Any], completion: list[Any], given: int, whole: list[Any]
) -> None:
    chat = parse_prompt_completion({"prompt": prompt, "completion": completion}, "x:1")
    assert chat == Chat(place="x:1", messages=tuple(whole), given=given, repeated=True)


def test_a_question_that_is_asked_twice_is_no_repetition() -> None:
    completion = [MESSAGES[1], MESSAGES[0], MESSAGES[3]]
    chat = parse_prompt_completion({"prompt": MESSAGES[:1], "completion": completion}, "x:1")
    assert chat == Chat(place="x:1", messages=(MESSAGES[0], *completion), given=1)


QUESTION = "What is the name of it?"


@pytest.mark.parametrize(
    ("prompt", "completion", "asked", "answer"),
    [
        (QUESTION, f"{QUESTION} Bo.", QUESTION, " Bo."),
        (f"{QUESTION}\n", f"{QUESTION}\nBo.", f"{QUESTION}\n", "Bo."),
        (f"{QUESTION}\n\n", f"{QUESTION} Bo.", QUESTION, " Bo."),
        ("Q:", "Q: Bo.", "Q:", " Bo."),
    ],
)
def test_a_text_that_the_completion_repeats_stands_there_once(
    prompt: str, completion: str, asked: str, answer: str
) -> None:
    expected = Completion(place="x:1", prompt=asked, completion=answer, repeated=True)
    assert parse_prompt_completion({"prompt": prompt, "completion": completion}, "x:1") == expected
    assert parse_input_output({"input": prompt, "output": completion}, "x:1") == expected
    assert parse_trace({"prompt": prompt, "answer": completion}, "x:1") == expected


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Hi", "Hi there."),
        (QUESTION, QUESTION),
        (QUESTION, f"{QUESTION}\n"),
        ("He sees what is on the table", "He sees what is on the tables."),
        (QUESTION, f" {QUESTION} Bo."),
        ("", "Bo."),
        (" \n", " \nBo."),
    ],
)
def test_a_completion_that_may_begin_with_these_words_itself_stays(prompt: str, completion: str) -> None:
    expected = Completion(place="x:1", prompt=prompt, completion=completion)
    assert parse_prompt_completion({"prompt": prompt, "completion": completion}, "x:1") == expected
