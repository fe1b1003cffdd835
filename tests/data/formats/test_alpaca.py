"""Alpaca rows become conversations. Run: pytest tests/data/formats"""

from typing import Any

import pytest

from hft_megatron.data.formats.conversations import parse_alpaca
from hft_megatron.errors import UserError


def texts(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in parse_alpaca(row, "x:1").messages]


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}], ids=str)
def test_without_an_input_the_user_says_the_instruction(empty: dict[str, Any]) -> None:
    assert texts({"instruction": "do", "output": " done\n", **empty}) == [("user", "do"), ("assistant", " done\n")]


def test_the_input_follows_the_instruction_on_a_line_of_its_own() -> None:
    assert texts({"instruction": "add", "input": "1 2", "output": "3"})[0] == ("user", "add\n1 2")


def test_without_an_instruction_the_user_says_the_input() -> None:
    assert texts({"instruction": "", "input": "1+2", "output": "3"}) == [("user", "1+2"), ("assistant", "3")]


def test_system_and_history_come_first() -> None:
    row = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    assert texts(row) == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"instruction": None, "output": "b"}, "`instruction` is null"),
        ({"instruction": "a", "output": 1}, "`output` is a number"),
        ({"instruction": "a", "output": "b", "input": []}, "`input` is an empty list"),
        ({"instruction": "a", "output": "b", "history": "x"}, "`history` is text"),
        ({"instruction": "a", "output": "b", "history": [["a", "b"], ["c"]]}, "entry 2 of `history`"),
    ],
)
def test_a_wrong_value_is_named(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^x:1: {sentence}"):
        parse_alpaca(row, "x:1")
