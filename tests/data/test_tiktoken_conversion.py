"""Llama 3's own tokenizer.model, a tiktoken file, on its own and in a folder."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hft_megatron.data.tiktoken_conversion import WORDS
from hft_megatron.data.tokenizer_export import TEXTS
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.data_files import load, trained_texts, write_rows

ROUND_TRIPS = ["", "\n\n\t x  \r\n", "é日本🧑‍🚀", "\x00\x7f\ufeff\u2028", "<|eot_id|>", "a b" * 500]


def llama3_folder(ranks: Path, folder: Path, first: int) -> Path:
    """Llama 3's own tokenizer.model (tiktoken's ranks) with the names of its special tokens, as Meta numbers them."""
    folder.mkdir()
    shutil.copyfile(ranks, folder / "tokenizer.model")
    names = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{number}|>" for number in range(4))]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
    added = {
        str(first + number): {"content": name, "special": True, "normalized": False}
        for number, name in enumerate(names)
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names[0], "eos_token": names[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": added}))
    return folder


def make_ranks(file: Path) -> Path:
    """A tiktoken file like Llama 3's, with 276 tokens: all bytes, then joined ones."""
    joined = [b" t", b"th", b" th", b"the", b" the", b"an", b"and", b" and", b"\n\n", b"12", b"123", b"\xe6\x97", b"ll"]
    joined += [b" w", b"or", b" wor", b"ld", b" world", b"  "]
    joined += [b"qzx"]  # no two others make it: whole words are looked up first
    tokens = [*(bytes([byte]) for byte in range(256)), *joined]
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)]
    file.write_bytes(b"".join(lines))
    return file


def tiktoken_reading(file: Path) -> Callable[[str], list[int]]:
    """The tiktoken package's own ids; the file is not read by it, because it keeps copies of files by their paths."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed: make install brings it")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file.read_bytes().splitlines())}
    encoding = tiktoken.Encoding("llama3", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    return lambda text: list(encoding.encode(text, disallowed_special=()))


def test_a_bare_tiktoken_file_gives_tiktokens_ids_and_llama_3s_special_tokens(tmp_path: Path) -> None:
    file = make_ranks(tmp_path / "ranks.model")
    tokenizer = load_tokenizer(None, file, "llama3")
    reading = tiktoken_reading(file)
    for text in [*TEXTS, *ROUND_TRIPS, " the  world and 1234\n\n\nthe", "it's THE'LL qzx", "qzx", "<|eot_id|>"]:
        assert tokenizer.encode(text) == reading(text)
    named = {token.content: token.id for token in tokenizer.facts.special_tokens}
    first = tokenizer.bos_id or 0
    assert (len(named), tokenizer.vocab_size) == (256, first + 256)
    assert (named["<|begin_of_text|>"], named["<|eot_id|>"]) == (first, first + 9)
    assert "256 special tokens are used" in tokenizer.facts.notes[0]
    tokenizer.export(tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("the world<|eot_id|>").input_ids == [first, *reading("the world"), first + 9]


def test_a_tiktoken_folder_has_the_tokens_that_it_lists(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ranks = make_ranks(tmp_path / "ranks.model")
    tokenizer = load_tokenizer(None, llama3_folder(ranks, tmp_path / "in", 276), "llama3")
    assert tokenizer.vocab_size == 276 + 10
    assert tokenizer.special(285, trained=False).text == "<|eot_id|>"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.facts.notes) == (276, 277, ())
    assert capfd.readouterr() == ("", "")  # transformers, which tries SentencePiece first and says so, is not asked


def test_a_tiktoken_file_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    file = make_ranks(tmp_path / "ranks.model")
    before = load_tokenizer(None, file)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]))
    after = load_tokenizer(None, file)
    assert (before.vocab_size, after.vocab_size) == (276 + 256, 275 + 256)
    assert before.facts.identity != after.facts.identity


def test_a_broken_line_of_a_tiktoken_file_is_named(tmp_path: Path) -> None:
    file = make_ranks(tmp_path / "ranks.model")
    file.write_bytes(file.read_bytes() + b"not base64!\n")
    with pytest.raises(UserError, match=r"ranks\.model:277 is not a token in base64 and its rank"):
        load_tokenizer(None, file)


@pytest.mark.slow(reason="128,000 tokens and their 280,000 merges")
def test_llama_3s_own_file_gives_tiktokens_ids(shared_data: Path, tmp_path: Path) -> None:
    ranks = shared_data / "tokenizers/llama3/tokenizer_llama3.tiktoken"
    folder = llama3_folder(ranks, tmp_path / "in", 128_000)
    tokenizer = load_tokenizer(None, folder, "llama3")
    reading = tiktoken_reading(ranks)
    lines = (shared_data / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()[:100]
    for text in [*TEXTS, *ROUND_TRIPS, *lines, "<|eot_id|>"]:
        assert tokenizer.encode(text) == reading(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    messages = [{"role": "user", "content": "hi <|eot_id|>"}, {"role": "assistant", "content": "\n\nHello"}]
    dataset = load(write_rows(tmp_path / "rows.jsonl", [{"messages": messages}]), tokenizer)
    assert trained_texts(dataset, tokenizer, 0, "llama3") == ["\n\nHello"]
    assert dataset.example(0)[0][-1] == 128_009
    tokenizer.export(tmp_path / "out")
    exported = load_tokenizer(None, tmp_path / "out")
    assert exported.encode("hi <|eot_id|>\n") == tokenizer.encode("hi <|eot_id|>\n")
