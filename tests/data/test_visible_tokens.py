"""Every token is shown with its own part of the text. Run: pytest tests/data/test_visible_tokens.py"""

from pathlib import Path

import numpy as np
import pytest

from hft_megatron.data.shown_examples import visible_tokens
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from tests.support.data_files import load, write_rows
from tests.support.tokenizers import make_byte_level, train_sentencepiece

PROMPT, ANSWER = " Once 日本 🙂\tup\n\n", "é \n  The end🙂"


@pytest.fixture(params=["sentencepiece", "byte level"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    made = make_byte_level(tmp_path) if request.param == "byte level" else train_sentencepiece(tmp_path)
    return load_tokenizer(None, made)


def test_the_texts_of_all_tokens_make_the_example(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}] * 2
    rows = [{"prompt": PROMPT, "completion": ANSWER}, {"text": ANSWER}]
    completions = load(write_rows(tmp_path / "a.jsonl", rows[:1]), tokenizer)
    texts = load(write_rows(tmp_path / "b.jsonl", rows[1:]), tokenizer)
    chats = load(write_rows(tmp_path / "c.jsonl", [{"messages": messages}]), tokenizer)
    begin, end = (tokenizer.special(token, trained=False).text for token in (tokenizer.bos_id or 0, tokenizer.eos_id))
    turns = f"<|user|>\n{PROMPT}\n<|assistant|>\n{ANSWER}{end}"
    for dataset, whole in (
        (completions, f"{begin}{PROMPT}{ANSWER}{end}"),
        (texts, f"{begin}{ANSWER}{end}"),
        (chats, f"{begin}{turns}\n{turns}"),
    ):
        ids, trained = dataset.example(0)
        shown = visible_tokens(tokenizer, ids, trained)
        assert "".join(token.text for token in shown) == whole
        assert [token for part in shown for token in part.ids] == ids.tolist()
        assert [part.trained for part in shown for _ in part.ids] == trained.tolist()
        assert [part.text for part in shown if part.special] == [begin] + [end] * (2 if dataset is chats else 1)
        # Characters of several tokens are whole, and everything else stands on its own.
        assert max(len(part.ids) for part in shown) == 4
        assert sum(len(part.ids) == 1 for part in shown) > len(shown) / 2


def test_what_does_not_print_is_shown_as_an_escape(tokenizer: Tokenizer) -> None:
    ids = np.array(tokenizer.encode("\x1b[2J\u202e\x00"), dtype=np.int32)
    shown = visible_tokens(tokenizer, ids, np.zeros(len(ids), dtype=np.bool_))
    assert "".join(token.text for token in shown) == "\\x1b[2J\\u202e\\x00"


def test_the_first_token_is_never_trained(tokenizer: Tokenizer) -> None:
    ids = np.array([tokenizer.eos_id, *tokenizer.encode_batch(["bc"], continues=True)[0]], dtype=np.int32)
    shown = visible_tokens(tokenizer, ids, np.ones(len(ids), dtype=np.bool_))
    assert [token.trained for token in shown] == [False] + [True] * (len(shown) - 1)


def test_bytes_that_make_no_character_are_shown_and_none_is_lost(tokenizer: Tokenizer) -> None:
    ids = np.array(tokenizer.encode_batch(["a🙂b"], continues=True)[0][:3], dtype=np.int32)
    shown = visible_tokens(tokenizer, ids, np.zeros(len(ids), dtype=np.bool_))
    assert [token for part in shown for token in part.ids] == ids.tolist()
    assert "\ufffd" in "".join(token.text for token in shown)
