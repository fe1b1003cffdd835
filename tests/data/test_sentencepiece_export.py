"""Pieces and added tokens that stay ordinary: SentencePiece's ids are trained, and those that the export gives."""

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.tokenizers import train_sentencepiece

DEFINED = ["[TURN]", "[TURN:end]", "cap", "<|x y|>"]
TEXTS = [
    "a[TURN]b",
    "Once [TURN] upon",
    "[TURN]",
    "[TURN][TURN:end]  x[TURN:en",
    " capital cap, escape",
    "<|x y|> <|x  y|>",
    "[TURN]</s>[TURN]<unk>cap<0x0A>",
    "[TURN]é🙂[TURN:end]\n",
]
UNIGRAM = {"model_type": "unigram", "vocab_size": 345}
REMOVES = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}


def exported_ids(folder: Path, text: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(folder).encode(
        text, add_special_tokens=False, split_special_tokens=True
    )
    return ids


@pytest.mark.parametrize(
    "options", [{}, REMOVES, {"byte_fallback": False}, {"add_dummy_prefix": False}, UNIGRAM, UNIGRAM | REMOVES], ids=str
)
def test_defined_pieces_are_found_where_sentencepiece_finds_them_also_after_export(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    file = train_sentencepiece(tmp_path / "in", user_defined_symbols=DEFINED, **options)
    tokenizer = load_tokenizer(None, file)
    own = SentencePieceProcessor(model_file=str(file))
    assert tokenizer.facts.notes == ()
    assert tokenizer.export(tmp_path / "out", adds_template=False) == []
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert tokenizer.encode(text) == own.encode(text)
        assert loaded.encode(text, add_special_tokens=False, split_special_tokens=True) == own.encode(text), text


def test_no_mark_stands_behind_a_defined_piece_in_the_middle_of_a_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(None, train_sentencepiece(tmp_path / "in", user_defined_symbols=["[TURN]"]))
    tokenizer.export(tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.tokenize("a[TURN]b") == ["▁a", "[TURN]", "b"]
    assert loaded.tokenize("a [TURN] b") == ["▁a", "▁", "[TURN]", "▁", "b"]


@pytest.mark.parametrize("options", [{}, UNIGRAM], ids=str)
def test_a_name_that_a_text_spells_out_is_text_also_in_training_from_an_export(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    tokenizer = load_tokenizer(None, train_sentencepiece(tmp_path / "in", user_defined_symbols=DEFINED, **options))
    tokenizer.export(tmp_path / "out")
    exported = load_tokenizer(None, tmp_path / "out")
    for text in ("</s>", "<s>", "<unk>", "<0x0A>", "cap</s>cap"):
        for continues in (False, True):
            [ids] = exported.encode_batch([text], continues=continues)
            assert [ids] == tokenizer.encode_batch([text], continues=continues)
            assert not {token.id for token in tokenizer.facts.special_tokens} & set(ids)


@pytest.mark.parametrize(
    ("piece", "options"), [("ﬁ", REMOVES), ("a  b", {"remove_extra_whitespaces": True})], ids=["characters", "spaces"]
)
def test_a_defined_piece_that_normalization_would_change_is_refused(
    tmp_path: Path, piece: str, options: dict[str, Any]
) -> None:
    file = train_sentencepiece(tmp_path, user_defined_symbols=[piece], **options)
    with pytest.raises(UserError, match=f"has the user-defined piece '{piece}', which its own normalization") as caught:
        load_tokenizer(None, file)
    assert "\n" not in str(caught.value)


def test_an_export_that_differs_says_so_and_claims_nothing(tmp_path: Path) -> None:
    """The tokenizers library normalizes a line end of two characters as one."""
    options = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": False}
    file = train_sentencepiece(tmp_path / "in", **options)
    difference = "of 'line\\nends\\r\\n\\n\\n behind', without special tokens, instead of ["
    [note] = load_tokenizer(None, file).facts.notes
    assert note.startswith(f"{file}: an export's tokenizer.json makes [")
    assert difference in note
    (tmp_path / "in/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    changed, differs = load_tokenizer(None, tmp_path / "in").export(tmp_path / "out", adds_template=False)
    assert "gives the trained ids" not in changed
    assert "tokenizer.json does not give the trained ids for every text: it makes [" in differs
    assert difference in differs


def added(folder: Path, **flags: bool) -> Path:
    """A folder whose files add ``<tab>``, which is not special, behind 360 pieces."""
    train_sentencepiece(folder)
    return write_flags(folder, **flags)


def write_flags(folder: Path, **flags: bool) -> Path:
    token = {"content": "<tab>", "special": False, "normalized": False, **flags}
    config = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {"360": token}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}], ids=str)
def test_white_space_around_an_added_token_belongs_to_it_where_its_flags_say_so(
    tmp_path: Path, flags: dict[str, bool]
) -> None:
    tokenizer = load_tokenizer(None, added(tmp_path / "in", **flags))
    left = "a" if "lstrip" in flags else "a \n"
    right = "b" if "rstrip" in flags else "\t b"
    expected = [*tokenizer.encode(left), 360, *tokenizer.encode(right)]
    assert tokenizer.encode("a \n<tab>\t b") == expected
    tokenizer.export(tmp_path / "out")
    for text in ("a \n<tab>\t b", "<tab> ", " <tab>", "<tab> <tab>", "x<tab><tab>y", "a\x1c<tab>\x1fb"):
        assert exported_ids(tmp_path / "out", text) == tokenizer.encode(text), text


def test_an_added_token_that_is_a_single_word_is_not_found_within_another(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(None, added(tmp_path / "in", single_word=True))
    tokenizer.export(tmp_path / "out")
    for text, found in (("a <tab> b", 1), ("a<tab> b", 0), ("a <tab>b", 0), ("<tab>", 1), ("(<tab>)", 1)):
        assert tokenizer.encode(text).count(360) == found
        assert exported_ids(tmp_path / "out", text) == tokenizer.encode(text), text


def test_flags_of_an_added_token_are_part_of_the_identity(tmp_path: Path) -> None:
    folder = added(tmp_path)
    flags: list[dict[str, bool]] = [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}]
    assert len({load_tokenizer(None, write_flags(folder, **each)).facts.identity for each in flags}) == 4
