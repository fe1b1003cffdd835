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
    ],
    ids=["messages", "text and answers", "text and conversations", "conversations"],
)
def test_every_form_with_messages_is_the_same_pair(row: dict[str, Any]) -> None:
    pair = parse_preference(row, "x:1")
    assert (pair.prompt, pair.chosen, pair.rejected) == ((ASK,), (GOOD,), (BAD,))


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
        ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, "`rejected` is a list, but it must be text"),
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
    ("row", "fault"),
    [
        ({"chosen": [GOOD], "rejected": [BAD]}, "`chosen` and `rejected` begin differently"),
        ({"chosen": [SYSTEM, GOOD], "rejected": [ASK, BAD]}, "`chosen` and `rejected` begin differently"),
        ({"prompt": "z", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "`prompt` is none of the messages"),
        ({"prompt": "a", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, None),
    ],
)
def test_answers_to_different_prompts_are_a_pair_with_a_fault(row: dict[str, Any], fault: str | None) -> None:
    found = parse_preference(row, "x:1").fault
    assert (found or "").startswith(fault or "")
    assert (found is None) == (fault is None)
