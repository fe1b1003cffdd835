"""Documents are scored token by token, each once, with as much before it as the windows give.

Run: pytest tests/evaluation/test_kinds_text.py
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed: make install brings it")

from hypothesis import given, settings
from hypothesis import strategies as st

from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from hft_megatron.evaluation.kinds import KINDS
from hft_megatron.evaluation.kinds.text import windows_of
from hft_megatron.evaluation.measures import MEASURES
from tests.support import tokenizers
from tests.support.data_files import write_rows
from tests.support.tasks import asked, scores, task_of
from tests.support.tokenizers import make_byte_level, train_sentencepiece

TEXT = "Once upon a time there was a bridge. " * 8


@given(st.integers(2, 200), st.integers(2, 40), st.data())
@settings(max_examples=200, deadline=None)
def test_every_token_but_the_first_is_scored_once_with_enough_before_it(
    size: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    ids = np.arange(size, dtype=np.int32)
    scored_ids: list[int] = []
    for number, (part, scored) in enumerate(windows_of(ids, window, stride)):
        assert part.tolist() == ids[number * stride : number * stride + window + 1].tolist()
        assert not scored[0]
        assert scored.any()
        for place in np.flatnonzero(scored):
            assert place >= min(window - stride, int(part[place]))
        scored_ids += part[scored].tolist()
    assert scored_ids == list(range(1, size))


def test_windows_are_those_of_the_formula() -> None:
    shown = [(part.tolist(), part[scored].tolist()) for part, scored in windows_of(np.arange(10, dtype=np.int32), 4, 2)]
    assert shown == [
        ([0, 1, 2, 3, 4], [1, 2, 3, 4]),
        ([2, 3, 4, 5, 6], [5, 6]),
        ([4, 5, 6, 7, 8], [7, 8]),
        ([6, 7, 8, 9], [9]),
    ]


def scored_of(folder: Path, tokenizer: Tokenizer, context: int = 4096, /, **task: Any) -> list[tuple[int, int]]:
    """(scored tokens, bytes) of each document."""
    examples = asked(task_of(folder, kind="text", **task), tokenizer, context).examples
    return [(sum(int(scored.sum()) for _, scored in example.sequences), example.facts["bytes"]) for example in examples]


@pytest.mark.parametrize(("window", "stride"), [(None, None), (16, None), (16, 5), (16, 16)])
def test_windows_change_no_count(tmp_path: Path, tokenizer: Tokenizer, window: int | None, stride: int | None) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": TEXT}, {"text": "grüß dich 🙂"}])
    expected = [(len(tokenizer.encode(text)), len(text.encode())) for text in (TEXT, "grüß dich 🙂")]
    assert scored_of(tmp_path, tokenizer, 64, files="a.jsonl", window=window, stride=stride) == expected
    with_end = scored_of(tmp_path, tokenizer, 64, files="a.jsonl", window=window, stride=stride, end_token=True)
    assert with_end == [(tokens + 1, size) for tokens, size in expected]


def test_a_text_file_is_one_document_or_several_with_a_separator(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n<|e|>\nfour\n", encoding="utf-8")
    (found,) = scored_of(tmp_path, tokenizer, files="a.txt")
    assert found[1] == len("one\ntwo\n\nthree\n<|e|>\nfour")
    parts = scored_of(tmp_path, tokenizer, files="a.txt", separator="<|e|>")
    assert [size for _, size in parts] == [len("one\ntwo\n\nthree"), len("four")]
    with pytest.raises(UserError, match=r"tasks\.yaml:1: no line of .*a\.txt is the separator '<\|x\|>'"):
        scored_of(tmp_path, tokenizer, files="a.txt", separator="<|x|>")
    write_rows(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match=r"separator is for \.txt files, but .*a\.jsonl is not one"):
        scored_of(tmp_path, tokenizer, files="a.jsonl", separator="<|x|>")


def test_the_value_is_of_all_tokens_and_bytes_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": TEXT}, {"text": "no"}])
    task = task_of(tmp_path, kind="text", files="a.jsonl", window=32, metrics=list(KINDS["text"].metrics()))
    examples = asked(task, tokenizer).examples
    records = [
        KINDS["text"].record(task, example, scores(example, *[-2.0 * int(s.sum()) for _, s in example.sequences]))
        for example in examples
    ]
    tokens, size = sum(record["tokens"] for record in records), len(TEXT) + 2
    sums = {name: np.sum([record["statistics"][name] for record in records], axis=0).tolist() for name in task.metrics}
    assert MEASURES["cross_entropy"].total(sums["cross_entropy"]) == pytest.approx(2.0)
    assert MEASURES["perplexity"].total(sums["perplexity"]) == pytest.approx(math.exp(2.0))
    assert MEASURES["bits_per_byte"].total(sums["bits_per_byte"]) == pytest.approx(2.0 * tokens / size / math.log(2))


def test_documents_without_a_token_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": ""}, {"text": "yes"}])
    found = asked(task_of(tmp_path, kind="text", files="a.jsonl"), tokenizer)
    assert [example.place for example in found.examples] == ["a.jsonl:2"]
    assert found.counts == {"empty_documents": 1, "windows": 1, "unscored_tokens": 0}
    assert found.notes == ("made: documents left out, which have no token to score: 1 of 2",)
    write_rows(tmp_path / "a.jsonl", [{"text": ""}])
    with pytest.raises(UserError, match="the task made is empty: no row has a text to score"):
        asked(task_of(tmp_path, kind="text", files="a.jsonl"), tokenizer)


def test_without_a_begin_token_the_first_token_is_not_scored_nor_are_its_bytes(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": TEXT}])
    without = tokenizer.with_facts(bos_id=None)
    ids = tokenizer.encode(TEXT)
    found = asked(task_of(tmp_path, kind="text", files="a.jsonl"), without)
    ((part, scored),) = found.examples[0].sequences
    assert part.tolist() == ids
    assert int(scored.sum()) == len(ids) - 1
    assert found.examples[0].facts["bytes"] == len(TEXT) - len(tokenizer.decode(ids[:1]))
    assert found.counts["unscored_tokens"] == 1
    assert "the first token of each of the 1 documents is not scored" in found.notes[0]


def of_sentencepiece(folder: Path) -> Tokenizer:
    return load_tokenizer(None, train_sentencepiece(folder, add_dummy_prefix=False))


def of_bytes(folder: Path) -> Tokenizer:
    return load_tokenizer(None, make_byte_level(folder, merges=False))


def of_parts_of_characters(folder: Path) -> Tokenizer:
    """Has tokens of several bytes that end within a character."""
    with patch.object(tokenizers, "CORPUS", ["a🙂 a🙃 a😀 橋 機 橄 "] * 20):
        return load_tokenizer(None, make_byte_level(folder))


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (of_sentencepiece, [1, 1, 1, 1, 1, 1, 1]),
        (of_bytes, [1, 1, 1, 1, 1, 1, 1]),
        (of_parts_of_characters, [2, 2, 4, 3, 1, 1, 1]),
    ],
)
def test_a_first_token_within_a_character_has_its_own_bytes(
    made: Callable[[Path], Tokenizer], expected: list[int], tmp_path: Path
) -> None:
    tokenizer = made(tmp_path / "tokenizer").with_facts(bos_id=None)
    texts = ["橋 and 橋橋", "機", "🙂🙂", "🙄", "ü", "a🙄", "plain"]
    write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    sizes = [size for _, size in scored_of(tmp_path, tokenizer, files="a.jsonl")]
    assert [len(text.encode()) - size for text, size in zip(texts, sizes, strict=True)] == expected


def test_windows_that_the_model_has_no_room_for_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": TEXT}])
    with pytest.raises(UserError, match="window 65 of the task made is more than the 64 tokens that the model reads"):
        scored_of(tmp_path, tokenizer, 64, files="a.jsonl", window=65)
    with pytest.raises(UserError, match="stride 65 of the task made is more than the window of 64"):
        scored_of(tmp_path, tokenizer, 64, files="a.jsonl", stride=65)
