"""Every message and turn is what its role says, or named. Run: pytest tests/data/formats"""

from typing import Any

import pytest

from hft_megatron.data.formats.conversations import parse_messages, parse_sharegpt
from hft_megatron.errors import UserError

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}
TEXT_PART = {"type": "text", "text": "a"}
SYSTEM = {"from": "system", "value": "s"}
HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1}


def test_messages_are_kept_with_their_extra_keys() -> None:
    chat = parse_messages({"messages": [USER, ANSWER, ANSWER]}, "x:1")
    assert chat.messages == (USER, ANSWER, ANSWER)


def test_sharegpt_turns_keep_their_extra_keys() -> None:
    assert parse_sharegpt({"conversations": [GPT]}, "x:1").messages == (
        {"role": "assistant", "content": "b", "weight": 1},
    )


def test_parts_of_text_are_joined_with_nothing_between() -> None:
    parts = [TEXT_PART, {"type": "text", "text": " b", "image_url": None}]
    chat = parse_messages({"messages": [USER | {"content": parts}, ANSWER | {"content": [TEXT_PART]}]}, "x:1")
    assert chat.messages == (USER | {"content": "a b"}, ANSWER | {"content": "a"})
    assert len(parts) == 2  # the row is as it was


def test_turns_of_tools_keep_their_roles_and_a_call_is_what_the_assistant_says() -> None:
    turns = [("human", "a"), ("function_call", '{"name": "f"}'), ("observation", "3"), ("tool", "4"), ("gpt", "b")]
    chat = parse_sharegpt({"conversations": [{"from": name, "value": text} for name, text in turns]}, "x:1")
    roles = ["user", "assistant", "tool", "tool", "assistant"]
    assert [(message["role"], message["content"]) for message in chat.messages] == list(
        zip(roles, [text for _, text in turns], strict=True)
    )
    tool = {"role": "tool", "content": "3", "tool_call_id": "x"}
    assert parse_messages({"messages": [USER, ANSWER, tool, ANSWER]}, "x:1").messages[2] == tool


@pytest.mark.parametrize("text", [{}, {"content": None}])
def test_a_call_of_a_tool_needs_no_text(text: dict[str, None]) -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    [_, message] = parse_messages({"messages": [USER, {**call, **text}]}, "x:1").messages
    assert message == {**call, "content": None}


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


def test_a_system_text_beside_a_system_turn_stands_there_once() -> None:
    chat = parse_sharegpt({"conversations": [SYSTEM, HUMAN, GPT], "system": "s"}, "x:1")
    assert chat == parse_sharegpt({"conversations": [HUMAN, GPT], "system": "s"}, "x:1")
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": {}}, "`messages` is an object, but it must be a list"),
        ({"messages": []}, "`messages` is an empty list"),
        ({"messages": '[{"role": "user"}]'}, "`messages` is text, .*; the text holds JSON: write the list itself"),
        ({"messages": [HUMAN, GPT]}, "have `from` but no `role`, .* read it with --data-keys messages=conversations"),
        ({"messages": ["a"]}, "message 1 is text"),
        ({"messages": [ANSWER, {"content": "a"}]}, "message 2 has the role None"),
        ({"messages": [{"role": "gpt", "content": "a"}]}, "has the role 'gpt', but it must be one of system, user, as"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "message 1 has the role \\['user'\\]"),
        ({"messages": [{"role": "x" * 99, "content": "a"}]}, "the role 'x{36}\\.\\.\\., but"),
        ({"messages": [{"role": "user"}]}, "the `content` of message 1 is missing"),
        ({"messages": [{"role": "user", "content": []}]}, "the `content` of message 1 is an empty list"),
        ({"messages": [USER]}, "has no assistant turn"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "the `content` of message 1 has text as part 1, but"),
        (
            {"messages": [ANSWER, {"role": "user", "content": [TEXT_PART, {"type": "image_url", "image_url": {}}]}]},
            "the `content` of message 2 has the type 'image_url' in part 2; only text is read",
        ),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "the type None in part 1"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a part 1 whose `text` is missing"),
        ({"messages": [{"role": "user", "content": [{**TEXT_PART, "weight": 0}]}]}, "the key 'weight' in part 1"),
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
        ({"conversations": '[{"from": "gpt"}]'}, "`conversations` is text, .*; the text holds JSON: write the list it"),
        ({"conversations": [USER, ANSWER]}, "have `role` but no `from`, .* --data-keys conversations=messages"),
        ({"conversations": [HUMAN, None]}, "turn 2 is null"),
        ({"conversations": [{"value": "a"}]}, "the `from` of turn 1 is missing, but it must be one of system, human"),
        ({"conversations": [{"from": 1, "value": "a"}]}, "the `from` of turn 1 is a number"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "the `from` of turn 1 is 'bot'"),
        ({"conversations": [{"from": "observation", "value": "a"}]}, "has no assistant turn"),
        ({"conversations": [{"from": "gpt"}]}, "the `value` of turn 1 is missing"),
        ({"conversations": [{"from": "gpt", "value": {}}]}, "the `value` of turn 1 is an object"),
        ({"conversations": [HUMAN]}, "has no assistant turn"),
        ({"conversations": [GPT], "system": 1}, "`system` is a number"),
        ({"conversations": [SYSTEM, GPT], "system": "t"}, "`system` differs from the system message of the co"),
        ({"conversations": [{**GPT, "role": "user"}]}, "turn 1 has `role` as well as `from` and `value`; keep one"),
    ],
)
def test_a_wrong_turn_is_named(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^x:1: .*{sentence}"):
        parse_sharegpt(row, "x:1")
