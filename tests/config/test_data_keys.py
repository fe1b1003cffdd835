"""What --data-keys and --prompt-separator mean, and what they cannot. Run: pytest tests/config/test_data_keys.py"""

import pytest

from hft_megatron.config.data import KNOWN_KEYS, data_keys, prompt_separator
from hft_megatron.data.formats.table import FORMATS
from hft_megatron.errors import UserError


def test_keys_are_mapped_in_one_order_however_they_are_written() -> None:
    assert data_keys(None) == ()
    assert data_keys("question=prompt") == (("question", "prompt"),)
    for words in ("question=prompt, answer = completion", "answer=completion,question=prompt"):
        assert data_keys(words) == (("answer", "completion"), ("question", "prompt"))
    assert data_keys("prompt=answer,answer=prompt") == (("answer", "prompt"), ("prompt", "answer"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "--data-keys : '' is not KEY=NAME; write for example question=prompt."),
        ("question", "'question' is not KEY=NAME"),
        ("question=", "'question=' is not KEY=NAME"),
        ("a=prompt,,b=text", "'' is not KEY=NAME"),
        ("a=b", "'b' is not a key of any format; choose one of messages, conversations, prompt, "),
        ("prompt=question", "text, such as question=prompt: the record's key comes first."),
        ("a=prompt,a=text", "'a' is given twice"),
        ("a=prompt,b=prompt", "'prompt' is given twice; map every key once."),
    ],
)
def test_words_that_map_nothing_are_named(words: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        data_keys(words)
    assert sentence in str(caught.value)


def test_every_key_of_a_format_can_be_meant() -> None:
    optional = {"input", "history", "system"}
    assert set(KNOWN_KEYS) == {key for format in FORMATS.values() for key in format.keys} | optional


def test_a_separator_has_line_ends_and_tabs() -> None:
    written = {"": "", " ": " ", r"\n": "\n", r"\n\nA:\t": "\n\nA:\t", r"\\n": r"\n", "\n": "\n", "é": "é"}
    assert {words: prompt_separator(words) for words in written} == written
    for words in ("\\", r"\x", "a\\\\\\"):
        with pytest.raises(UserError, match=r"a \\ must be followed by n, t or another"):
            prompt_separator(words)
