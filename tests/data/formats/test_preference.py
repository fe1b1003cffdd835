"""Every way to write a pair gives the same prompt and answers, or is named. Run: pytest tests/data/formats"""

import json
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.data.formats.preference import parse_preference
from hft_megatron.errors import UserError

SYSTEM, ASK = {"role": "system", "content": "s"}, {"role": "user", "content": "a"}
GOOD, BAD = {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "a", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "a", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": [ASK], "chosen": GOOD, "rejected": BAD},
        {"prompt": [ASK], "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "assistant", "value": "c"}},
        {"prompt": [{"from": "human", "value": "a"}], "chosen": GOOD, "rejected": [BAD]},
        {"conversations": [{"from": "human", "value": "a"}], "chosen": GOOD, "rejected": BAD},
        {"messages": [ASK], "chosen": GOOD, "rejected": BAD},
        {"messages": [ASK, BAD], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"instruction": "a", "input": "", "chosen": "b", "rejected": "c"},
        {"instruction": "a", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    ],
    ids=lambda row: " ".join(f"{key}:{type(value).__name__}" for key, value in row.items()),
)
def test_every_form_with_messages_is_the_same_pair(row: dict[str, Any]) -> None:
    pair = parse_preference(row, "x:1")
    assert (pair.prompt, pair.chosen, pair.rejected) == ((ASK,), (GOOD,), (BAD,))


def test_a_system_text_stands_in_front_of_every_form_of_messages_once() -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "a", "chosen": "b", "rejected": "c", "system": "s"},
        {"conversations": [{"from": "human", "value": "a"}], "chosen": GOOD, "rejected": BAD, "system": "s"},
        {"prompt": [SYSTEM, ASK], "chosen": GOOD, "rejected": BAD, "system": "s"},
        {"chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
    ]
    assert [parse_preference(row, "x:1").prompt for row in rows] == [(SYSTEM, ASK)] * len(rows)


def test_three_texts_stay_texts() -> None:
    pair = parse_preference({"prompt": "a", "chosen": "b", "rejected": ""}, "x:1")
    assert (pair.prompt, pair.chosen, pair.rejected) == ("a", "b", "")


def test_the_prompt_is_all_that_the_conversations_share_but_their_last_message() -> None:
    turns = [SYSTEM, ASK, GOOD, ASK]
    pair = parse_preference({"prompt": "a", "chosen": [*turns, GOOD], "rejected": [*turns, GOOD]}, "x:1")
    assert (pair.prompt, pair.chosen, pair.rejected) == (tuple(turns), (GOOD,), (GOOD,))
    early = parse_preference({"chosen": [ASK, GOOD, ASK, GOOD], "rejected": [ASK, BAD]}, "x:1")
    assert (early.prompt, early.chosen, early.rejected) == ((ASK,), (GOOD, ASK, GOOD), (BAD,))


@pytest.mark.parametrize("name", ["ultrafeedback_train", "hh_mixed_norm", "dpo_en_demo_norm"])
def test_real_pairs_are_put_together_again(shared_data: Path, name: str) -> None:
    lines = (shared_data / f"preference/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 300
    for line in lines:
        row = json.loads(line)
        pair = parse_preference(row, "x:1")
        assert isinstance(pair.prompt, tuple)
        assert [*pair.prompt, *pair.chosen] == row["chosen"]
        assert [*pair.prompt, *pair.rejected] == row["rejected"]
        assert len(pair.chosen) == len(pair.rejected) == 1


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"chosen": "b", "rejected": "c"}, "`prompt` is missing"),
        ({"chosen": "b", "rejected": "c", "query": "a"}, "name the key that holds it with --data-keys query=prompt"),
        (
            {"chosen": [GOOD], "rejected": [BAD], "question": "a"},
            "`prompt` is missing, and both conversations begin with the assistant; name the key that holds it with "
            "--data-keys question=prompt, or write a `prompt`",
        ),
        ({"chosen": GOOD, "rejected": [BAD, ASK, GOOD], "system": "s"}, "`prompt` is missing, and both conversations"),
        ({"chosen": "b\n\nAssistant: x", "rejected": "c", "n": 1}, "--data-keys KEY=prompt, or write a `prompt`"),
        (
            {"prompt": "a", "chosen": "b", "rejected": [BAD]},
            "`chosen` is text and `rejected` is a list; write both alike",
        ),
        (
            {"messages": [ASK, GOOD], "chosen": "b", "rejected": "c"},
            "the last message of `messages` is the assistant's",
        ),
        (
            {"prompt": [ASK, BAD], "chosen": [ASK, GOOD], "rejected": GOOD},
            "and `rejected` begins with the assistant, t",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "system": "s"}, "with --data-keys prompt=instruction, or"),
        ({"prompt": [SYSTEM, ASK], "chosen": "b", "rejected": "c", "system": "t"}, "`system` differs from"),
        ({"conversations": [{"from": "x"}], "chosen": "b", "rejected": "c"}, "turn 1 is 'x', but it must be one of"),
        ({"prompt": "a", "chosen": {"from": "gpt"}, "rejected": BAD}, "`value` of turn 1 of `chosen` is missing"),
        ({"instruction": 1, "chosen": "b", "rejected": "c"}, "`instruction` is a number"),
        ({"prompt": "a", "chosen": 1, "rejected": [BAD]}, "`chosen` is a number, but it must be a list"),
        ({"prompt": 1, "chosen": [GOOD], "rejected": [BAD]}, "`prompt` is a number"),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "`prompt` is an empty list"),
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": [{"role": "x"}]}, "message 1 of `rejected` has the role 'x'"),
        ({"prompt": [ASK], "chosen": [GOOD, ASK], "rejected": [BAD]}, "the last message of `chosen` is the user's"),
    ],
)
def test_a_wrong_pair_is_named(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^x:1: .*{sentence}"):
        parse_preference(row, "x:1")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": [GOOD, ASK, GOOD], "rejected": [GOOD, ASK, BAD]}, None),
        ({"chosen": [SYSTEM, GOOD], "rejected": [ASK, BAD]}, "`chosen` and `rejected` begin differently"),
        ({"prompt": "z", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "`prompt` is none of the messages"),
        ({"prompt": "a", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, None),
    ],
)
def test_answers_to_different_prompts_are_a_pair_with_a_problem(row: dict[str, Any], problem: str | None) -> None:
    found = parse_preference(row, "x:1").problem
    assert (found or "").startswith(problem or "")
    assert (found is None) == (problem is None)
