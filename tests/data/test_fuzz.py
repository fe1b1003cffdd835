"""No file and no record makes the loader end in anything but its own error, or train another text than the answer.

Run: pytest tests/data/test_fuzz.py (needs hypothesis, which the dev extra brings).
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed: make install brings it")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hft_megatron.data.formats.table import FORMATS
from hft_megatron.data.templates import BUILT_IN
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.data_files import load, trained_texts
from tests.support.tokenizers import make_byte_level, train_sentencepiece

# The folders of one test are shared by its examples, which each write the file anew.
FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TEXT = st.text(max_size=12) | st.sampled_from(
    ["</s>", "<|im_end|>", "[/INST]", "\x00", "\ufdd0", "{{ x }}", "user", "gpt"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]) | JSON, "content": TEXT | JSON})
    | st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]) | JSON, "value": TEXT | JSON})
    | JSON,
    max_size=4,
)
KEYS = sorted({key for format in FORMATS.values() for key in format.keys} | {"input", "system", "history", "tools"})
RECORDS = st.dictionaries(st.sampled_from(KEYS) | TEXT, TEXT | MESSAGES | JSON, max_size=5) | JSON
"""Records with the keys that formats look for and values that they may or may not expect."""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    byte_level = make_byte_level(folder / "hf", special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
    sentencepiece = train_sentencepiece(folder / "sp")
    return [
        *(load_tokenizer(None, byte_level, template) for template in BUILT_IN),
        *(load_tokenizer(None, sentencepiece, template) for template in ("plain", "tulu", "llama2")),
    ]


def accepted(path: Path, tokenizer: Tokenizer, **rules: Any) -> bool:
    """Whether the file makes a data set; else there must be one sentence that names the file."""
    sentence = ""
    try:
        load(path, tokenizer, **rules)
    except UserError as error:
        sentence = str(error)
    assert sentence.isprintable(), repr(sentence)
    assert not sentence or str(path) in sentence
    return not sentence


@FUZZ
@given(
    rows=st.lists(RECORDS, min_size=1, max_size=3),
    name=st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz"]),
    data_format=st.none() | st.sampled_from(sorted(FORMATS)),
    loss_on=st.sampled_from(["assistant", "all", "last"]),
    number=st.integers(0, 7),
)
def test_no_record_ends_in_another_error(
    tmp_path: Path, tokenizers: list[Tokenizer], rows: list[Any], name: str, data_format: Any, loss_on: str, number: int
) -> None:
    text = json.dumps(rows) if name == "a.json" else "".join(json.dumps(row) + "\n" for row in rows)
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    accepted(tmp_path / name, tokenizers[number], data_format=data_format, loss_on=loss_on)


@FUZZ
@given(
    name=st.sampled_from(
        ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.parquet", "a.csv", "a.tsv.gz", "a"]
    ),
    content=st.binary(max_size=60)
    | st.text(alphabet='{}[]":,\\\\u0d8 \\n\\ufefftextprom', max_size=60).map(str.encode)
    | st.binary(max_size=30).map(gzip.compress),
)
def test_no_file_ends_in_another_error(tmp_path: Path, tokenizers: list[Tokenizer], name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    accepted(tmp_path / name, tokenizers[0])


@FUZZ
@given(prompt=st.text(max_size=20), answer=st.text(max_size=20), number=st.integers(0, 7), chat=st.booleans())
def test_any_answer_is_trained_exactly_or_refused(
    tmp_path: Path, tokenizers: list[Tokenizer], prompt: str, answer: str, number: int, chat: bool
) -> None:
    tokenizer = tokenizers[number]
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    row = {"messages": messages} if chat else {"prompt": prompt, "completion": answer}
    answered = {"messages": [messages[0] | {"content": "a"}, messages[1] | {"content": "b"}]}
    rows = [row, answered if chat else {"prompt": "a", "completion": "b"}]  # not all answers may be empty
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    template = next(name for name, text in BUILT_IN.items() if text == tokenizer.facts.chat_template)
    if accepted(tmp_path / "a.jsonl", tokenizer):
        dataset = load(tmp_path / "a.jsonl", tokenizer)
        # SentencePiece writes a space as this character and cannot tell the two apart.
        expected = answer if tokenizer.continues_after_special else answer.replace("\u2581", " ")
        assert trained_texts(dataset, tokenizer, 0, template if chat else "verbatim") == [expected]
    else:
        assert any(mark in prompt + answer for mark in "\ufdd0\ufdd1\ufdd2")
