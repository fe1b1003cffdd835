"""What a folder's JSON files say of tokens: names, mistakes in them, added tokens, and the begin token."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer

from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.data_files import load, write_rows
from tests.support.published_tokenizers import PublishedTokenizers
from tests.support.tokenizers import make_byte_level, train_sentencepiece


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedTokenizers:
    return PublishedTokenizers(tmp_path_factory.mktemp("published"))


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def sentencepiece_folder(folder: Path, **config: Any) -> Path:
    train_sentencepiece(folder)
    write(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **config})
    return folder


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        (
            "tokenizer_config.json",
            {"bos_token": "", "eos_token": ""},
            "config.json: bos_token, eos_token are empty; give",
        ),
        (
            "special_tokens_map.json",
            {"unk_token": {"content": ""}},
            "special_tokens_map.json: unk_token is empty; give",
        ),
        ("tokenizer_config.json", {"eos_token": 2}, "tokenizer_config.json: eos_token is 2; give the token's text"),
        ("tokenizer_config.json", {"eos_token": {"content": {}}}, "tokenizer_config.json: eos_token is"),
        (
            "tokenizer_config.json",
            {"unk_token": "<gone>"},
            "unk_token is '<gone>', which is not in the tokenizer's voc",
        ),
        (
            "special_tokens_map.json",
            {"bos_token": "[B]"},
            "special_tokens_map.json: bos_token is '\\[B\\]', which is not",
        ),
        ("tokenizer_config.json", [1], "tokenizer_config.json is not a JSON object; copy it again"),
        ("added_tokens.json", {"<a>": "x"}, "added_tokens.json has added tokens that cannot be read"),
        ("added_tokens.json", {"<a>": 900}, "the added token '<a>' the id 900, but the next free one is"),
    ],
)
@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_a_mistake_in_the_files_is_one_sentence(
    tmp_path: Path, kind: str, file: str, content: object, sentence: str
) -> None:
    folder = sentencepiece_folder(tmp_path) if kind == "sentencepiece" else make_byte_level(tmp_path)
    write(folder, file, content)
    with pytest.raises(UserError, match=sentence.replace("the added token ", ".*")) as caught:
        load_tokenizer(None, folder)
    assert "\n" not in str(caught.value)


def test_a_name_that_refers_to_itself_ends_in_a_sentence(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path, unk_token="unk_token", eos_token="eos_token")
    with pytest.raises(UserError, match="eos_token is 'eos_token', which is not in the tokenizer's vocabulary"):
        load_tokenizer(None, folder)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_a_pad_token_that_the_vocabulary_lacks_is_replaced_and_named(tmp_path: Path, kind: str) -> None:
    folder = sentencepiece_folder(tmp_path) if kind == "sentencepiece" else make_byte_level(tmp_path, eos_token=None)
    write(
        folder,
        "special_tokens_map.json",
        {"pad_token": "[PAD]", "eos_token": "</s>" if kind[0] == "s" else "<|im_end|>"},
    )
    tokenizer = load_tokenizer(None, folder)
    assert tokenizer.pad_id == (0 if kind == "sentencepiece" else tokenizer.eos_id)
    assert any("pad_token is '[PAD]', which is not in the tokenizer's vocabulary" in n for n in tokenizer.facts.notes)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<tool>": 334, "<end>": 335}),
        (
            "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|bos|>",
                "eos_token": "<end>",
                "added_tokens_decoder": {
                    "334": {"content": "<tool>", "special": False},
                    "335": {"content": "<end>", "special": True, "normalized": False},
                },
            },
        ),
    ],
)
def test_tokens_that_only_the_files_beside_it_have_are_added(tmp_path: Path, file: str, content: object) -> None:
    folder = make_byte_level(tmp_path / "in", eos_token="<end>")
    plain = load_tokenizer(None, make_byte_level(tmp_path / "plain"))
    assert plain.vocab_size == 334
    write(folder, file, content)
    tokenizer = load_tokenizer(None, folder)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (336, 335)
    assert tokenizer.encode("a<tool>b<end>") == [*plain.encode("a"), 334, *plain.encode("b<end>")]


def test_files_beside_a_model_file_are_read_without_a_config(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path, user_defined_symbols=["<end>"])
    alone = load_tokenizer(None, tmp_path)
    write(tmp_path, "added_tokens.json", {"<tool>": alone.vocab_size})
    added = load_tokenizer(None, tmp_path)
    assert added.encode("a<tool>") == [*alone.encode("a"), alone.vocab_size]
    write(tmp_path, "special_tokens_map.json", {"eos_token": "<end>"})
    assert load_tokenizer(None, tmp_path).eos_id == alone.encode_batch(["<end>"], continues=True)[0][0]
    assert load_tokenizer("SentencePieceTokenizer", tmp_path).facts == alone.facts


def test_added_tokens_of_a_sentencepiece_folder_are_found_in_a_text(published: PublishedTokenizers) -> None:
    tokenizer = load_tokenizer(None, published.path("vicuna"))
    ids = tokenizer.encode("one <pad> two")
    assert ids == [*tokenizer.encode("one "), 360, *tokenizer.encode(" two")]
    assert tokenizer.decode(ids) == "one <pad> two"


def test_a_piece_that_the_files_name_special_comes_from_no_text(published: PublishedTokenizers) -> None:
    tokenizer = load_tokenizer(None, published.path("yi"))
    ids = tokenizer.encode("a<|im_end|><|im_start|>")
    assert not {3, 4} & set(ids)
    assert tokenizer.decode(ids) == "a<|im_end|><|im_start|>"


def test_a_piece_that_is_named_as_the_end_token_comes_from_no_text(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path, user_defined_symbols=["<|im_end|>"])
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>"})
    tokenizer = load_tokenizer(None, tmp_path)
    assert tokenizer.eos_id == 3
    assert 3 not in tokenizer.encode("a<|im_end|>b")


def test_a_list_of_added_tokens_without_flags_leaves_those_of_tokenizer_json(tmp_path: Path) -> None:
    folder = make_byte_level(tmp_path)
    rust = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    rust.add_tokens([AddedToken("<gap>", lstrip=True)])
    rust.save(str(folder / "tokenizer.json"))
    write(folder, "added_tokens.json", {"<gap>": 334})
    tokenizer = load_tokenizer(None, folder)
    assert tokenizer.encode("a  <gap>") == [*tokenizer.encode("a"), 334]


LISTED = {"added_tokens_decoder": {}}
"""Without it, special_tokens_map.json wins over the config, as in transformers."""


@pytest.mark.parametrize(("config", "eos"), [({}, "<|im_start|>"), (LISTED, "<|im_end|>")], ids=["map", "config"])
def test_which_file_names_a_token_is_transformers_rule(tmp_path: Path, config: dict[str, Any], eos: str) -> None:
    folder = make_byte_level(tmp_path, **config)
    write(folder, "special_tokens_map.json", {"eos_token": "<|im_start|>"})
    assert load_tokenizer(None, folder).facts.template_variables["eos_token"] == eos
    assert AutoTokenizer.from_pretrained(folder).eos_token == eos


@pytest.mark.parametrize(
    ("tokenizer_class", "add_bos_token", "in_file", "begins"),
    [
        ("LlamaTokenizerFast", True, False, True),
        ("LlamaTokenizerFast", False, True, False),
        ("LlamaTokenizerFast", None, True, True),
        ("LlamaTokenizerFast", None, False, False),
        ("PreTrainedTokenizerFast", True, False, False),
        ("PreTrainedTokenizerFast", False, True, True),
    ],
)
def test_a_begin_token_is_put_as_the_config_of_a_llama_class_or_the_file_says(
    tmp_path: Path, tokenizer_class: str, add_bos_token: bool | None, in_file: bool, begins: bool
) -> None:
    said = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    folder = make_byte_level(tmp_path / "in", tokenizer_class=tokenizer_class, **said)
    if not in_file:
        state = json.loads((folder / "tokenizer.json").read_text())
        write(folder, "tokenizer.json", {**state, "post_processor": None})
    tokenizer = load_tokenizer(None, folder)
    named = RustTokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<|bos|>")
    assert tokenizer.bos_id == (named if begins else None)
    assert tokenizer.facts.template_variables["bos_token"] == "<|bos|>"
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "What?", "completion": "This."}])
    assert bool(load(rows, tokenizer).example(0)[0][0] == named) == begins


@pytest.mark.parametrize(
    ("said", "begins"), [({}, True), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False)]
)
def test_a_sentencepiece_folder_puts_a_begin_token_unless_told_otherwise(
    tmp_path: Path, said: dict[str, bool], begins: bool
) -> None:
    tokenizer = load_tokenizer(None, sentencepiece_folder(tmp_path, **said))
    assert tokenizer.bos_id == (1 if begins else None)


def test_a_space_between_two_parts_of_a_text_stays_where_others_are_removed(published: PublishedTokenizers) -> None:
    tokenizer = load_tokenizer(None, published.path("openllama"))
    for gap in (" ", "  ", "\n", "\u3000"):
        parts = tokenizer.encode("The capital") + tokenizer.encode_batch([f"{gap}of France "], continues=True)[0]
        assert parts == tokenizer.encode("The capital of France")
    joined = tokenizer.encode("Once") + tokenizer.encode_batch(["s"], continues=True)[0]
    assert tokenizer.decode(joined) == "Onces"
    assert tokenizer.encode_batch(["", "  "], continues=True) == [[], []]
