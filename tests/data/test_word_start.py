"""A text that continues another has no word-start mark before it, and behind added tokens those of any text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from hft_megatron.data.huggingface_tokenizer import ContinuingPipeline
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_export import first_difference
from hft_megatron.data.tokenizer_loading import load_tokenizer
from tests.support.tokenizers import make_byte_level, train_sentencepiece


def _prepends(rust: RustTokenizer) -> None:
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.pre_tokenizer = None


def _metaspace(scheme: str) -> Callable[[RustTokenizer], None]:
    def change(rust: RustTokenizer) -> None:
        rust.normalizer = None
        rust.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)

    return change


def _prefixes(rust: RustTokenizer) -> None:
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


MARKS = {"prepend": _prepends, "always": _metaspace("always"), "first": _metaspace("first"), "byte level": _prefixes}
FLAGS: dict[str, dict[str, Any]] = {
    "plain": {"normalized": False},
    "normalized": {"normalized": True},
    "strips": {"normalized": False, "lstrip": True, "rstrip": True},
    "single word": {"normalized": False, "single_word": True},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Folders without and with bytes for letters."""
    folder = tmp_path_factory.mktemp("tokenizers")
    load_tokenizer(None, train_sentencepiece(folder / "model")).export(folder / "marks")
    return {False: folder / "marks", True: make_byte_level(folder / "bytes")}


@pytest.fixture
def made(source: dict[bool, Path], tmp_path: Path) -> Callable[[str, str], tuple[Tokenizer, RustTokenizer]]:
    def make(marks: str, flags: str) -> tuple[Tokenizer, RustTokenizer]:
        folder = source[marks == "byte level"]
        rust = RustTokenizer.from_file(str(folder / "tokenizer.json"))
        MARKS[marks](rust)
        rust.add_tokens([AddedToken("<gap>", **FLAGS[flags])])
        rust.save(str(tmp_path / "tokenizer.json"))
        config = (folder / "tokenizer_config.json").read_bytes()
        (tmp_path / "tokenizer_config.json").write_bytes(config)
        return load_tokenizer(None, tmp_path), rust

    return make


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("marks", MARKS)
def test_an_answer_with_an_added_token_has_the_ids_that_it_has_in_the_whole_text(
    made: Callable[[str, str], tuple[Tokenizer, RustTokenizer]], marks: str, flags: str
) -> None:
    tokenizer, rust = made(marks, flags)
    for text in ("4<gap>y", "4 <gap> y<gap>z", "4 x y", "4<gap>", "4<gap><gap> 4"):
        # Digits are in no merge, so nothing reaches over the cut.
        parts = tokenizer.encode("a\t") + tokenizer.encode_batch([text], continues=True)[0]
        assert parts == rust.encode(f"a\t{text}", add_special_tokens=False).ids, text
    assert tokenizer.facts.notes == ()


def test_an_answer_that_begins_with_an_added_token_marks_the_word_behind_it(
    made: Callable[[str, str], tuple[Tokenizer, RustTokenizer]],
) -> None:
    tokenizer, rust = made("prepend", "plain")
    gap, mark = rust.token_to_id("<gap>"), rust.token_to_id("▁")
    assert tokenizer.encode_batch(["4<gap>7"], continues=True) == [
        [rust.token_to_id("4"), gap, mark, rust.token_to_id("7")]
    ]


def test_a_pipeline_without_marks_behind_added_tokens_is_a_difference_inside_a_text(
    made: Callable[[str, str], tuple[Tokenizer, RustTokenizer]],
) -> None:
    tokenizer, rust = made("always", "plain")
    mark, gap = rust.token_to_id("▁"), rust.token_to_id("<gap>")

    def encode(text: str, with_special: bool) -> list[int]:
        ids: list[int] = rust.encode(text, add_special_tokens=with_special).ids
        if not text.startswith("a<gap>b"):
            return ids
        return [number for before, number in zip([0, *ids], ids, strict=False) if (before, number) != (gap, mark)]

    assert first_difference(tokenizer, lambda text, special: rust.encode(text, add_special_tokens=special).ids) is None
    assert "of 'a<gap>b <gap> c', without special tokens, instead of" in str(first_difference(tokenizer, encode))


def test_data_tokenized_by_the_rule_of_before_is_another_tokenizers(
    made: Callable[[str, str], tuple[Tokenizer, RustTokenizer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    marked, _ = made("always", "plain")
    monkeypatch.setattr(ContinuingPipeline, "differs_after_added", False)
    assert made("always", "plain")[0].facts.identity != marked.facts.identity
