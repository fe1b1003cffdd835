"""Prompts and completions are texts, or messages as in TRL. Run: pytest tests/data/formats"""

from pathlib import Path
from typing import Any

import pytest

from hft_megatron.data.formats.completions import parse_prompt_completion
from hft_megatron.data.tokenizers import load_tokenizer
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
        ({"prompt": MESSAGES[:1], "completion": "2"}, "`prompt` is a list, but it must be text"),
        ({"prompt": [], "completion": MESSAGES}, "`prompt` is an empty list, but it must be a list of at least one"),
        ({"prompt": MESSAGES[:2], "completion": MESSAGES[2:3]}, "the conversation has no assistant turn"),
        ({"prompt": [{"role": "robot"}], "completion": MESSAGES}, "message 1 of `prompt` has the role 'robot'"),
    ],
)
def test_a_wrong_value_is_named(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^x:1: {sentence}"):
        parse_prompt_completion(row, "x:1")
