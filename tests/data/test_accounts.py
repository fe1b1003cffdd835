"""What is not learned of a source is told: empty answers, turns that are switched off, keys that nobody reads.

Run: pytest tests/data/test_accounts.py
"""

from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.data import DataConfig
from hft_megatron.data.loading import training_pairs
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.data_files import load, write_rows
from tests.support.preprocessing import make
from tests.support.tokenizers import make_byte_level


@pytest.fixture(scope="module", params=["llama2", "tulu"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Llama 2's form trains spaces around an answer, also around none."""
    return load_tokenizer(None, make_byte_level(tmp_path_factory.mktemp("tokenizer")), request.param)


def answered(*texts: str) -> dict[str, Any]:
    rounds = [({"role": "user", "content": "ask"}, {"role": "assistant", "content": text}) for text in texts]
    return {"messages": [message for pair in rounds for message in pair]}


EMPTY = {
    "messages": (answered(""), answered("b", "\n")),
    "prompt-completion": ({"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "b"}),
    "alpaca": ({"instruction": "a", "output": " "}, {"instruction": "a", "output": "b"}),
    "text": ({"text": ""}, {"text": "a"}),
}
"""A record with an empty answer, and one with another."""


@pytest.mark.parametrize("format", EMPTY)
def test_empty_answers_are_counted(tmp_path: Path, tokenizer: Tokenizer, format: str) -> None:
    empty, answers = (2, 3) if format == "messages" else (1, 2)
    path = write_rows(tmp_path / "rows.jsonl", EMPTY[format])
    dataset = load(path, tokenizer)
    expected = f"{path}: {empty} of {answers} answers are empty: only their end token is trained"
    assert dataset.describe()[1:] == [expected]
    assert load(path, tokenizer, loss_on="all").describe()[1:] == []


@pytest.mark.parametrize("format", EMPTY)
def test_a_source_of_empty_answers_alone_is_an_error(tmp_path: Path, tokenizer: Tokenizer, format: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [EMPTY[format][0]] * 3)
    with pytest.raises(UserError, match=r"rows.jsonl: all 3 answers are empty, so only end tokens would"):
        load(path, tokenizer)
    prefix = tmp_path / "prefix"
    if format != "text":  # which has no end token there, unless it is asked for
        with pytest.raises(UserError, match=r"^--input .*rows.jsonl: all 3 answers are empty"):
            make(prefix, path, tokenizer)


def rows_with_keys(count: int) -> list[dict[str, Any]]:
    """Records of several chunks, with keys in some of them."""
    rows = []
    for number in range(count):
        row = answered("x", "" if number % 10 == 0 else "y")
        row["messages"][1]["weight"] = int(number % 4 > 0)
        row |= {"id": number} if number % 2 else {"topic\n": "t"}
        row |= {"label": 1} if number % 5 == 0 else {}
        rows.append(row)
    return rows


def test_preprocessed_data_tell_the_same_as_the_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, prefix = write_rows(tmp_path / "rows.jsonl", rows_with_keys(1100)), tmp_path / "prefix"
    facts = make(prefix, path, tokenizer, ignore_keys=("label",), workers=2)
    read = load(path, tokenizer, ignore_keys=("label",))
    mapped = load(prefix, tokenizer, ignore_keys=("label",))
    notes = [
        "turns not trained, by a key of their own: 275",
        "110 of 1,925 answers are empty: only their end token is trained",
        "keys that are not read: topic\\n (550), id (550)",
        "keys ignored by --ignore-keys: label (220)",
    ]
    assert read.describe()[1:] == [f"{path}: {note}" for note in notes]
    assert mapped.describe()[1:] == facts.counts.notes(str(prefix)) == [f"{prefix}: {note}" for note in notes]
    assert mapped.digest == read.digest
    assert mapped.parts[0].counts == read.parts[0].counts
    with pytest.raises(
        UserError, match="was preprocessed with --ignore-keys label, but the run has unset; use the same"
    ):
        load(prefix, tokenizer)


def test_repeated_prompts_are_counted_in_files_and_in_preprocessed_data(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ask, answer = answered("b")["messages"]
    rows = [
        {"prompt": [ask], "completion": [ask, answer]},
        {"prompt": "Say it:", "completion": "Say it: b"},
        {"prompt": "Say it:", "completion": " b"},
    ]
    path, prefix = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "prefix"
    make(prefix, path, tokenizer)
    read, mapped = load(path, tokenizer), load(prefix, tokenizer)
    note = "prompts that completions repeated, removed from the completions: 2"
    assert read.describe()[1:] == [f"{path}: {note}"]
    assert mapped.describe()[1:] == [f"{prefix}: {note}"]
    assert read.example(1)[0].tolist() == read.example(2)[0].tolist()
    assert read.example(1)[1].tolist() == read.example(2)[1].tolist()


RENDERED = "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\nb"


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        ([{"text": RENDERED}, {"text": "a <b> | im_start"}, {"text": f"a {RENDERED}"}], 2),
        ([{"prompt": RENDERED, "completion": "b"}, {"prompt": "a", "completion": "b"}], 1),
        ([{"input": "a", "output": "b<|im_end|>"}], 1),
        ([{"prompt": "a", "answer": "b<|im_end|>"}], 1),
        ([{"messages": [{"role": "user", "content": RENDERED}, {"role": "assistant", "content": "b"}]}], 0),
    ],
)
def test_rendered_conversations_in_verbatim_texts_are_counted(
    tmp_path: Path, rows: list[dict[str, Any]], count: int
) -> None:
    tokenizer = load_tokenizer(None, make_byte_level(tmp_path / "tokenizer"), "chatml")
    path, prefix = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "prefix"
    make(prefix, path, tokenizer, append_eod=True)
    note = f"records with names of special tokens in their texts, where they are ordinary characters: {count}; give con"
    for source in (path, prefix):
        lines = load(source, tokenizer).describe()[1:]
        assert len(lines) == (count > 0)
        assert all(line.startswith(f"{source}: {note}") for line in lines)


def test_rendered_conversations_in_pairs_are_counted(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(None, make_byte_level(tmp_path / "tokenizer"), "chatml")
    ask = {"role": "user", "content": RENDERED}
    rows = [
        {"prompt": RENDERED, "chosen": "b", "rejected": "c"},
        {"prompt": [ask], "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c<|im_end|>"},
    ]
    options = DataConfig(train_data_path=(str(write_rows(tmp_path / "pairs.jsonl", rows)),))
    pairs = training_pairs(options, tokenizer, 512, "error")
    assert pairs is not None
    [line] = pairs.accounts()[0][1:]
    assert "texts, where they are ordinary characters: 2; give conversations as messages" in line


def test_data_of_before_keys_were_looked_at_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, prefix = write_rows(tmp_path / "rows.jsonl", [answered("a")]), tmp_path / "prefix"
    make(prefix, path, tokenizer)
    facts = Path(f"{prefix}_preprocessed.json")
    facts.write_text(facts.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(UserError, match=r"has format 1, but this version of hft_megatron .* preprocess the data again"):
        load(prefix, tokenizer)


def test_pairs_tell_their_keys(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write_rows(tmp_path / "pairs.jsonl", [{**pair, "id": 1, "margin": 2}, pair])
    notes = [f"{path}: keys that are not read: id (1)", f"{path}: keys ignored by --ignore-keys: margin (1)"]
    pairs = training_pairs(DataConfig(train_data_path=(str(path),), ignore_keys="margin"), tokenizer, 512, "error")
    assert pairs is not None
    assert pairs.accounts()[0][1:] == notes
