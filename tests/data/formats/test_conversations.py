"""Every message and turn is what its role says, or named. Run: pytest tests/data/formats"""

from typing import Any

import pytest

from hft_megatron.data.formats.conversations import parse_messages, parse_sharegpt
from hft_megatron.errors import UserError

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}
HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1}


def test_messages_are_kept_with_their_extra_keys() -> None:
    chat = parse_messages({"messages": [USER, ANSWER, ANSWER]}, "x:1")
    assert chat.messages == (USER, ANSWER, ANSWER)


def test_sharegpt_turns_keep_their_extra_keys() -> None:
    assert parse_sharegpt({"conversations": [GPT]}, "x:1").messages == (
        {"role": "assistant", "content": "b", "weight": 1},
    )


def test_sharegpt_turns_become_messages_in_their_order() -> None:
    turns = [{"from": "system", "value": "s"}, HUMAN, HUMAN, GPT, {"from": "assistant", "value": ""}]
    chat = parse_sharegpt({"conversations": turns, "system": None}, "x:1")
    assert [(message["role"], message["content"]) for message in chat.messages] == [
        ("system", "s"),
        ("user", "a"),
        ("user", "a"),
        ("assistant", "b"),
        ("assistant", ""),
    ]
    assert parse_sharegpt({"conversations": [GPT], "system": "be brief"}, "x:1").messages[0] == {
        "role": "system",
        "content": "be brief",
    }


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": {}}, "`messages` is an object, but it must be a list"),
        ({"messages": []}, "`messages` is an empty list"),
        ({"messages": ["a"]}, "message 1 is text"),
        ({"messages": [ANSWER, {"content": "a"}]}, "message 2 has the role None"),
        ({"messages": [{"role": "gpt", "content": "a"}]}, "has the role 'gpt', but it must be one of system, user, as"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "message 1 has the role \\['user'\\]"),
        ({"messages": [{"role": "x" * 99, "content": "a"}]}, "the role 'x{36}\\.\\.\\., but"),
        ({"messages": [{"role": "user"}]}, "the `content` of message 1 is missing"),
        ({"messages": [{"role": "user", "content": []}]}, "the `content` of message 1 is an empty list"),
        ({"messages": [USER]}, "has no assistant turn"),
    ],
)
def test_a_wrong_message_is_named(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^x:1: .*{sentence}"):
        parse_messages(row, "x:1")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"conversations": "a"}, "`conversations` is text"),
        ({"conversations": []}, "`conversations` is an empty list"),
        ({"conversations": [HUMAN, None]}, "turn 2 is null"),
        ({"conversations": [{"value": "a"}]}, "the `from` of turn 1 is missing, but it must be one of system, human"),
        ({"conversations": [{"from": 1, "value": "a"}]}, "the `from` of turn 1 is a number"),
        ({"conversations": [{"from": "observation", "value": "a"}]}, "the `from` of turn 1 is 'observation'"),
        ({"conversations": [{"from": "gpt"}]}, "the `value` of turn 1 is missing"),
        ({"conversations": [{"from": "gpt", "value": {}}]}, "the `value` of turn 1 is an object"),
        ({"conversations": [HUMAN]}, "has no assistant turn"),
        ({"conversations": [GPT], "system": 1}, "`system` is a number"),
        ({"conversations": [{**GPT, "role": "user"}]}, "turn 1 has `role` as well as `from` and `value`; keep one"),
    ],
)
def test_a_wrong_turn_is_named(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^x:1: .*{sentence}"):
        parse_sharegpt(row, "x:1")
