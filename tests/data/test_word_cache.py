"""Ids by way of words are those of the Rust library on the whole text, or the cache is not used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer

from hft_megatron.data import rust_pipeline
from hft_megatron.data.rust_pipeline import WordCache, word_pattern
from hft_megatron.data.tokenizer_loading import load_tokenizer
from tests.support.tokenizers import CORPUS, make_byte_level, train_sentencepiece

PARTS = [" ", "▁", "  ", "\n", "\u00a0", "Once", "upon", "a", "é", "🙂", "4", "."]
TEXT = st.lists(st.sampled_from(PARTS)).map("".join)


@pytest.fixture(scope="module")
def own_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer.json with Llama 2's way of marking spaces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    load_tokenizer(None, train_sentencepiece(folder)).export(folder / "out")
    return as_the_library_writes(folder / "out/tokenizer.json")


def as_the_library_writes(file: Path) -> str:
    return str(RustTokenizer.from_file(str(file)).to_str())


def without_start(rust_json: str) -> str:
    state = json.loads(rust_json)
    state["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    state["pre_tokenizer"] = None
    return json.dumps(state)


def start_and_inside(rust_json: str) -> tuple[RustTokenizer, RustTokenizer]:
    made = RustTokenizer.from_str(rust_json), RustTokenizer.from_str(without_start(rust_json))
    for rust in made:
        rust.encode_special_tokens = True
    return made


def cache_of(rust_json: str) -> WordCache:
    words = word_pattern(rust_json)
    assert words is not None
    return WordCache(words, *start_and_inside(rust_json))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(st.one_of(TEXT, st.text(), st.sampled_from(CORPUS))), continues=st.booleans())
def test_any_text_has_the_ids_that_it_has_in_one_piece(own_json: str, texts: list[str], continues: bool) -> None:
    whole = start_and_inside(own_json)[continues]
    expected = [whole.encode(text, add_special_tokens=False).ids for text in texts]
    assert cache_of(own_json).encode_batch(texts, continues=continues) == expected


def test_a_full_cache_starts_anew_with_the_same_ids(own_json: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rust_pipeline, "MAX_CHARACTERS", 20)
    cache = cache_of(own_json)
    for text in [*CORPUS[:4], *CORPUS[:4]]:
        for continues in (False, True):
            expected = start_and_inside(own_json)[continues].encode(text, add_special_tokens=False).ids
            assert cache.encode_batch([text], continues=continues) == [expected]


def test_ids_that_were_given_away_do_not_change_the_kept_ones(own_json: str) -> None:
    cache = cache_of(own_json)
    first = cache.encode_batch(["Once upon"], continues=False)[0]
    kept = list(first)
    first.append(0)
    assert cache.encode_batch(["Once upon"], continues=False) == [kept]


def _add_token(state: dict[str, Any]) -> None:
    state["added_tokens"].append({**state["added_tokens"][0], "content": "two words", "special": False, "id": 9999})


def _join_words(state: dict[str, Any]) -> None:
    state["model"]["merges"].append(["e", "▁"])


@pytest.mark.parametrize(
    "change",
    [
        _add_token,
        _join_words,
        lambda state: state.update(normalizer={"type": "NFKC"}),
        lambda state: state.update(normalizer={"type": "Prepend", "prepend": " "}),
        lambda state: state.update(pre_tokenizer={"type": "Metaspace", "replacement": "▁", "split": True}),
        lambda state: state["model"].update(ignore_merges=True),
        lambda state: state["model"].update(dropout=0.1),
        lambda state: state["model"].update(type="Unigram"),
        lambda state: state["model"].update(byte_fallback=False),
        lambda state: state["model"].update(continuing_subword_prefix="##"),
        lambda state: state["model"].update(end_of_word_suffix="</w>"),
        lambda state: state["model"]["merges"].append(["<0x0A>", "<0x0A>"]),
        lambda state: state["model"].update(merges=[["▁", "▁"]]),
        lambda state: state["model"]["vocab"].pop("<0x0A>"),
    ],
    ids=[
        "added token",
        "joins words",
        "NFKC",
        "prefix",
        "splits",
        "ignores merges",
        "dropout",
        "Unigram",
        "no bytes",
        "prefix of parts",
        "suffix",
        "bytes merge",
        "marks only",
        "a byte missing",
    ],
)
def test_a_tokenizer_whose_words_may_not_stand_alone_is_used_on_whole_texts(
    own_json: str, change: Callable[[dict[str, Any]], None]
) -> None:
    state = json.loads(own_json)
    change(state)
    assert word_pattern(json.dumps(state)) is None


def test_a_byte_level_tokenizer_is_used_on_whole_texts(tmp_path: Path) -> None:
    assert word_pattern(as_the_library_writes(make_byte_level(tmp_path) / "tokenizer.json")) is None


@pytest.mark.parametrize("folder", ["stories260K", "tokenizers/llama2"])
def test_released_llama_tokenizers_have_words_that_stand_alone(shared_data: Path, folder: str) -> None:
    words = word_pattern(as_the_library_writes(shared_data / folder / "tokenizer.json"))
    assert words is not None
    assert words.findall(" two  words\n48") == [" two", "  words", "\n", "4", "8"]
