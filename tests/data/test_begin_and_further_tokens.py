"""What is put before a text, and how templates name tokens, where that differs from the named special tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import processors
from transformers import AutoTokenizer

from hft_megatron.data.rendering import Renderer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.data_files import load, write_rows
from tests.support.tokenizers import make_byte_level


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("bos_token", [None, "<|im_end|>", "<|pad|>"])
def test_a_begin_token_that_only_tokenizer_json_has_is_put(tmp_path: Path, bos_token: str | None) -> None:
    folder = make_byte_level(tmp_path / "in", bos_token=bos_token)
    tokenizer = load_tokenizer(None, folder)
    rust = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.bos_id == rust.token_to_id("<|bos|>")
    assert tokenizer.facts.template_variables.get("bos_token") == bos_token
    assert tokenizer.facts.notes == ()
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "What?", "completion": " This."}])
    assert load(rows, tokenizer).example(0)[0].tolist() == [
        *rust.encode("What?").ids,
        *rust.encode(" This.", add_special_tokens=False).ids,
        tokenizer.eos_id,
    ]
    for keep in (True, False):
        tokenizer.with_facts(exports_own_files=True).export(tmp_path / str(keep), keep_source=keep)
        assert load_tokenizer(None, tmp_path / str(keep)).bos_id == tokenizer.bos_id
        assert AutoTokenizer.from_pretrained(tmp_path / str(keep)).encode("a") == rust.encode("a").ids


def test_a_begin_token_that_is_no_special_one_comes_from_no_text_once_it_is_put(tmp_path: Path) -> None:
    folder = make_byte_level(tmp_path, bos_token=None)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["added_tokens"][0]["special"] = False
    write(folder, "tokenizer.json", state)
    tokenizer = load_tokenizer(None, folder)
    assert tokenizer.bos_id == state["added_tokens"][0]["id"]
    assert tokenizer.bos_id not in tokenizer.encode("a<|bos|>b")


def test_several_tokens_before_every_text_are_refused(tmp_path: Path) -> None:
    folder = make_byte_level(tmp_path)
    rust = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    special = [(name, rust.token_to_id(name)) for name in ("<|bos|>", "<|pad|>")]
    rust.post_processor = processors.TemplateProcessing(single="<|pad|> <|bos|> $A", special_tokens=special)
    rust.save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match=r"puts <\|pad\|> <\|bos\|> before every text, but only one begin token"):
        load_tokenizer(None, folder)


NAMED = {"image_token": "<|pad|>", "end_of_part": {"__type": "AddedToken", "content": "<part>", "special": True}}
"""Further tokens, one of which only this names."""


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"extra_special_tokens": NAMED}),
        ("tokenizer_config.json", {"model_specific_special_tokens": dict.fromkeys(NAMED, "<|pad|>")}),
        (
            "tokenizer_config.json",
            {"model_specific_special_tokens": {"image_token": "<|pad|>"}, "extra_special_tokens": ["<part>"]},
        ),
        ("special_tokens_map.json", {"extra_special_tokens": dict.fromkeys(NAMED, "<|pad|>")}),
    ],
    ids=["extra", "model specific", "beside a list", "map"],
)
def test_further_tokens_that_have_names_are_variables_of_templates(
    tmp_path: Path, file: str, content: dict[str, Any]
) -> None:
    folder = make_byte_level(
        tmp_path / "in", chat_template="{{ image_token }}|{{ end_of_part }}|{{ messages[0].content }}"
    )
    path = folder / file
    write(folder, file, {**(json.loads(path.read_text()) if path.exists() else {}), **content})
    tokenizer = load_tokenizer(None, folder)
    messages = [{"role": "user", "content": "a"}]
    ours = Renderer(tokenizer.facts.chat_template, tokenizer.facts.template_variables)
    rendered = ours.render(messages, add_generation_prompt=False)
    assert rendered.startswith("<|pad|>|")
    for keep in (True, False):
        tokenizer.with_facts(exports_own_files=True).export(tmp_path / str(keep), keep_source=keep)
    for each in (folder, tmp_path / "True", tmp_path / "False"):
        assert AutoTokenizer.from_pretrained(each).apply_chat_template(messages, tokenize=False) == rendered
        assert load_tokenizer(None, each).facts.special_tokens == tokenizer.facts.special_tokens
