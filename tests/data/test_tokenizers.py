"""Ids equal the libraries' own, special tokens in a text stay text, and an export loads as an equal tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hft_megatron.data.tokenizer import Tokenizer, choose_pad_id, fit_tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.tokenizers import CORPUS, make_byte_level, train_sentencepiece

TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "  two  spaces  ",
    "\n\n tab\t end\n",
    "日本語 🙂 é",
    "▁ mark ▁▁x",
    "<s> text </s><unk> <|im_end|>",
    "aaaa 1000000",
]
LLAMA2_FORM = "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"


def real_tokenizers(shared_data: Path, llama2: Callable[[str | None], Tokenizer], folder: str) -> list[Tokenizer]:
    """Of both kinds, first SentencePiece's."""
    kinds = ("SentencePieceTokenizer", "HuggingFaceTokenizer")
    if folder == "tokenizers/llama2":
        return [llama2(kind) for kind in kinds]
    return [load_tokenizer(kind, shared_data / folder) for kind in kinds]


def exported_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    loaded = AutoTokenizer.from_pretrained(folder)
    return [loaded.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"bos_id": -1},
        {"pad_id": 3},
        {"model_type": "unigram", "vocab_size": 340},
        {"model_type": "unigram", "vocab_size": 340, "normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
    ],
    ids=str,
)
def test_an_exported_sentencepiece_model_gives_the_same_ids_in_transformers(
    tmp_path: Path, options: dict[str, object]
) -> None:
    tokenizer = load_tokenizer(None, train_sentencepiece(tmp_path / "model", **options))
    tokenizer.export(tmp_path / "out")
    # transformers' Unigram finds control pieces in a text even when asked to treat it as text.
    texts = [text for text in TEXTS if options.get("model_type") != "unigram" or "<s>" not in text]

    assert exported_ids(tmp_path / "out", texts) == tokenizer.encode_batch(texts, continues=False)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    assert loaded.chat_template == tokenizer.facts.chat_template
    for ids in exported_ids(tmp_path / "out", CORPUS[:4]):
        assert loaded.decode(ids) == tokenizer.decode(ids)  # nmt_nfkc turns line ends into spaces in both
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert loaded("Once upon").input_ids == [*begin, *tokenizer.encode("Once upon")]


@pytest.mark.parametrize("folder", ["stories260K", "tokenizers/llama2"])
def test_real_llama_tokenizers_agree_in_both_kinds_and_after_export(
    shared_data: Path, llama2: Callable[[str | None], Tokenizer], tmp_path: Path, folder: str
) -> None:
    lines = (shared_data / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    texts = TEXTS + [json.loads(line)["answer"] for line in lines]
    sentencepiece, huggingface = real_tokenizers(shared_data, llama2, folder)
    for continues in (False, True):
        expected = sentencepiece.encode_batch(texts, continues=continues)
        assert huggingface.encode_batch(texts, continues=continues) == expected
    for name, tokenizer in (("sp", sentencepiece), ("hf", huggingface)):
        tokenizer.export(tmp_path / name)
        assert exported_ids(tmp_path / name, texts) == tokenizer.encode_batch(texts, continues=False)
    assert sentencepiece.continues_after_special == huggingface.continues_after_special


def test_special_tokens_in_a_text_are_ordinary_characters(tmp_path: Path) -> None:
    byte_level = load_tokenizer(None, make_byte_level(tmp_path / "hf"))
    sentencepiece = load_tokenizer(None, train_sentencepiece(tmp_path / "sp"))
    for tokenizer, text in ((byte_level, "a<|im_end|>b"), (sentencepiece, "a</s>b<unk>")):
        ids = tokenizer.encode(text)
        assert not {token.id for token in tokenizer.facts.special_tokens} & set(ids)
        assert tokenizer.decode(ids) == text


def test_continuing_text_gets_no_word_start_mark(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(None, train_sentencepiece(tmp_path))
    whole = tokenizer.encode_batch(["Answer:"], continues=False)[0] + tokenizer.encode_batch(["17"], continues=True)[0]
    assert tokenizer.decode(whole) == "Answer:17"
    marked = tokenizer.encode("Answer:") + tokenizer.encode("17")
    assert tokenizer.decode(marked) == "Answer: 17"


def test_a_huggingface_export_keeps_the_files_and_names_no_pad_token_where_they_name_none(tmp_path: Path) -> None:
    source = make_byte_level(tmp_path / "in", chat_template=LLAMA2_FORM)
    tokenizer = load_tokenizer(None, source)
    tokenizer.export(tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.chat_template == LLAMA2_FORM
    assert (loaded.pad_token, loaded.eos_token) == (None, "<|im_end|>")
    assert load_tokenizer(None, tmp_path / "out").facts.identity == tokenizer.facts.identity


def test_a_truncation_limit_in_tokenizer_json_is_not_applied(tmp_path: Path) -> None:
    folder = make_byte_level(tmp_path)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = load_tokenizer(None, folder)
    assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]


def test_padding_is_the_own_token_then_unknown_then_end() -> None:
    assert choose_pad_id(7, 0, 2) == 7
    assert choose_pad_id(None, 0, 2) == 0
    assert choose_pad_id(None, None, 2) == 2


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(None, make_byte_level(tmp_path))
    fit_tokenizer(tokenizer, tokenizer.vocab_size)
    with pytest.raises(UserError, match=f"has ids up to {tokenizer.vocab_size - 1}, .* vocabulary has 300 rows"):
        fit_tokenizer(tokenizer, 300)


def test_wrong_tokenizer_paths_are_named_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.model").write_text("no model")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/tokenizer_config.json").write_text("{}")
    (tmp_path / "empty.model").write_bytes(b"")
    endless = make_byte_level(tmp_path / "endless", eos_token=None)
    words = train_sentencepiece(tmp_path / "words", model_type="char", byte_fallback=False)
    cases: list[tuple[str | None, Path, str]] = [
        ("GPT2BPETokenizer", tmp_path, "--tokenizer-type GPT2BPETokenizer is not known"),
        (None, tmp_path / "absent", "absent does not exist"),
        (None, tmp_path / "empty", "empty holds no tokenizer"),
        ("SentencePieceTokenizer", tmp_path / "empty", "has no tokenizer.model"),
        ("HuggingFaceTokenizer", tmp_path / "text.model", "is a file, but HuggingFaceTokenizer needs the folder"),
        (None, tmp_path / "text.model", "is not a SentencePiece model"),
        (None, tmp_path / "empty.model", "empty.model is empty"),
        (None, tmp_path / "broken", "broken/tokenizer.json cannot be read by the tokenizers library"),
        (None, tmp_path / "bare", "cannot be read by transformers"),
        (None, endless, "names no special eos_token"),
        (None, words, "is of type CHAR"),
    ]
    for kind, path, sentence in cases:
        with pytest.raises(UserError, match=sentence) as caught:
            load_tokenizer(kind, path)
        assert "\n" not in str(caught.value)


ROUND_TRIPS = ["", " ", "\n\n\t x  \r\n", "é日本🧑‍🚀", "\x00\x7f\ufeff\u2028", "</s><|im_end|><unk><0x0A>", "a b" * 500]


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram", "byte level"])
def test_every_text_comes_back_byte_for_byte(tmp_path: Path, kind: str) -> None:
    if kind == "byte level":
        tokenizer = load_tokenizer(None, make_byte_level(tmp_path))
    else:
        options = {"model_type": "unigram", "vocab_size": 340} if kind == "unigram" else {}
        tokenizer = load_tokenizer(None, train_sentencepiece(tmp_path, **options))
    characters = "".join(map(chr, [*range(0x2580), *range(0xE000, 0xE100), *range(0x1F600, 0x1F650)]))
    for text in (*ROUND_TRIPS, characters):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_real_texts_come_back_byte_for_byte(shared_data: Path, llama2: Callable[[str | None], Tokenizer]) -> None:
    for folder in ("tokenizers/llama2", "stories260K"):
        for tokenizer in real_tokenizers(shared_data, llama2, folder):
            for name in ("gsm8k/test.jsonl", "preference/hh_mixed_norm.jsonl", "trace/mini/C-STANCE/train.json"):
                text = (shared_data / name).read_text(encoding="utf-8")[:5_000]
                assert tokenizer.decode(tokenizer.encode(text)) == text
            for text in ROUND_TRIPS:
                assert tokenizer.decode(tokenizer.encode(text)) == text
