"""Folders built like published ones: their own files make the ids before training, and transformers the same after."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer

from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_export import trained_ids
from hft_megatron.data.tokenizer_loading import load_tokenizer
from tests.support.published_tokenizers import PUTS_BEGIN, PublishedTokenizers

ATOMS = (
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        ".",
        "x",
        "Once upon",
        " a time",
        "1",
        "2026",
        "é",
        "日本",
        "🙂",
        "\ufb01",
        "\uff11",
        "½",
    ),
    *("\u200b", "\u00a0", "\u3000", "▁", "<0x0A>", "</s>", "<pad>", "<|im_end|>", "[INST]", "ø"),
)
texts = st.lists(st.sampled_from(ATOMS), max_size=12).map("".join)


@dataclass(frozen=True)
class Case:
    """A folder, what is trained on, and readings of the files by their own libraries."""

    folder: Path
    tokenizer: Tokenizer
    own: Callable[[str], list[int]]
    """Of a text, by sentencepiece or tokenizers."""
    behind: Callable[[str], list[int]]
    """Of a text behind the end token, without it."""
    exported: Any
    """transformers' tokenizer of the export."""


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    published = PublishedTokenizers(tmp_path_factory.mktemp("published"))

    @cache
    def make(name: str) -> Case:
        folder = published.path(name)
        tokenizer = load_tokenizer(None, folder)
        out = tmp_path_factory.mktemp(name)
        (out / "config.json").write_bytes((folder / "config.json").read_bytes())
        tokenizer.export(out)
        own, behind = readings(folder, tokenizer)
        return Case(folder, tokenizer, own, behind, AutoTokenizer.from_pretrained(out))

    return make


def readings(folder: Path, tokenizer: Tokenizer) -> tuple[Callable[[str], list[int]], Callable[[str], list[int]]]:
    """``own`` and ``behind`` of a Case."""
    if not (folder / "tokenizer.json").exists():
        pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return pieces.encode, pieces.encode
    rust = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    end = next(token.content for token in tokenizer.facts.special_tokens if token.id == tokenizer.eos_id)
    rust.encode_special_tokens = True
    raw = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    return (
        lambda text: rust.encode(text, add_special_tokens=False).ids,
        lambda text: raw.encode(end + text, add_special_tokens=False).ids[1:],
    )


def without_names(tokenizer: Tokenizer, given: Sequence[str]) -> list[str]:
    """``given`` without the names of added and special tokens, which only a template may produce."""
    names = [token.content for token in tokenizer.facts.special_tokens] + ["<pad>"]
    return [text for text in given if not any(name in text for name in names)]


@pytest.mark.parametrize("name", PUTS_BEGIN)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_the_ids_are_those_of_the_folders_own_files(case: Callable[[str], Case], name: str, text: str) -> None:
    made = case(name)
    for each in without_names(made.tokenizer, [text]):
        assert made.tokenizer.encode(each) == made.own(each)
        end = made.tokenizer.special(made.tokenizer.eos_id, trained=True).text
        assert trained_ids(made.tokenizer, [end + each]) == [[made.tokenizer.eos_id, *made.behind(each)]]


@pytest.mark.parametrize("name", PUTS_BEGIN)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_transformers_gives_the_trained_ids_after_export(case: Callable[[str], Case], name: str, text: str) -> None:
    made = case(name)
    begin = [] if made.tokenizer.bos_id is None else [made.tokenizer.bos_id]
    end = made.tokenizer.special(made.tokenizer.eos_id, trained=True).text
    for each in (text, f"{text}{end}{text}"):
        ids = trained_ids(made.tokenizer, [each])[0]
        assert made.exported.encode(each, add_special_tokens=False) == ids
        assert made.exported.encode(each) == begin + ids
