"""Pairs become two examples of which the answers alone are trained; what nothing can be learned of is named or counted.

Run: pytest tests/data/test_pairs.py
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hft_megatron.config.data import DataConfig
from hft_megatron.data.loading import training_pairs
from hft_megatron.data.pairs import PairDataset
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from tests.support.data_files import write_rows
from tests.support.tokenizers import make_byte_level

ASK, AGAIN = {"role": "user", "content": "Say it"}, {"role": "user", "content": "again"}
GOOD, BAD = {"role": "assistant", "content": "yes 🙂"}, {"role": "assistant", "content": "no"}
PAIR = {"prompt": "Say it: ", "chosen": "yes", "rejected": "no"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_byte_level(folder)
    return load_tokenizer(None, folder)


def load_pairs(
    path: Path, tokenizer: Tokenizer, seq_length: int = 512, bad_pairs: Any = "error", **data: Any
) -> PairDataset:
    pairs = training_pairs(DataConfig(train_data_path=(str(path),), **data), tokenizer, seq_length, bad_pairs)
    assert pairs is not None
    return pairs


def answer_of(pairs: PairDataset, tokenizer: Tokenizer, half: int) -> str:
    """The text of the trained tokens, which are one stretch up to the end token."""
    ids, trained = pairs.answers.example(half)
    where = np.flatnonzero(trained)
    assert np.array_equal(where, np.arange(where[0], where[-1] + 1))
    assert ids[where[-1]] == tokenizer.eos_id
    whole, before = tokenizer.decode(ids[: where[-1]].tolist()), tokenizer.decode(ids[: where[0]].tolist())
    assert whole.startswith(before)
    return whole[len(before) :]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": [ASK, BAD, AGAIN], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Say it", "chosen": "yes 🙂", "rejected": "no"},
    ],
    ids=["conversations", "after a turn of the assistant's", "texts"],
)
def test_an_answer_alone_is_trained_and_halves_share_their_prompt(
    tokenizer: Tokenizer, tmp_path: Path, row: dict[str, Any]
) -> None:
    pairs = load_pairs(write_rows(tmp_path / "pairs.jsonl", [row]), tokenizer)
    assert len(pairs) == 1
    assert [answer_of(pairs, tokenizer, half).strip() for half in (0, 1)] == ["yes 🙂", "no"]
    prompts = [ids[: int(np.argmax(trained))].tolist() for ids, trained in map(pairs.answers.example, (0, 1))]
    assert prompts[0] == prompts[1]
    assert pairs.num_positions(0) == pairs.answers.num_positions(0) + pairs.answers.num_positions(1)


BAD_PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "equal texts": (PAIR | {"rejected": "yes"}, "`chosen` and `rejected` are the same"),
    "equal messages": ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, "`chosen` and `rejected` are the same"),
    "empty text": (PAIR | {"rejected": " \n"}, "the answer in `rejected` is empty"),
    "empty message": (
        {"prompt": [ASK], "chosen": [GOOD | {"content": ""}], "rejected": [BAD]},
        "the answer in `chosen` is empty",
    ),
    "unshared prompt": ({"chosen": [ASK, GOOD], "rejected": [AGAIN, BAD]}, "begin differently"),
    "long prompt": (PAIR | {"prompt": "word " * 400}, "the prompt leaves no room for an answer within --seq-length"),
    "equal within the window": (
        PAIR | {"chosen": "same " * 400 + "yes", "rejected": "same " * 400 + "no"},
        "have the same tokens within --seq-length",
    ),
}


@pytest.mark.parametrize("kind", BAD_PAIRS)
def test_a_pair_of_which_nothing_can_be_learned_is_one_sentence_or_left_out_and_counted(
    tokenizer: Tokenizer, tmp_path: Path, kind: str
) -> None:
    row, sentence = BAD_PAIRS[kind]
    path = write_rows(tmp_path / "pairs.jsonl", [PAIR, row, PAIR | {"prompt": "Again: "}])
    with pytest.raises(UserError, match=f"pairs.jsonl:2: .*{sentence}.*; correct the pair, or choose --dpo-bad-pairs"):
        load_pairs(path, tokenizer, long_examples="truncate")
    pairs = load_pairs(path, tokenizer, long_examples="truncate", bad_pairs="skip")
    assert len(pairs) == 2
    [line] = pairs.accounts()[0]
    assert "2 pairs of 3 records" in line
    assert "1 left out: " in line
    assert sentence in line


def test_a_prompt_that_fills_the_window_is_a_bad_pair_whatever_becomes_of_long_answers(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", [PAIR, PAIR | {"prompt": "word " * 400}])
    with pytest.raises(UserError, match="leaves no room for an answer within --seq-length; correct the pair, or"):
        load_pairs(path, tokenizer, 64)
    assert len(load_pairs(path, tokenizer, 64, bad_pairs="skip")) == 1


def test_long_answers_are_an_error_or_dropped_or_cut_in_both_halves_alike(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [PAIR, PAIR | {"chosen": "yes " * 400}]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(UserError, match=r"pairs.jsonl:2: the prompt and an answer have .* but --seq-length is 64"):
        load_pairs(path, tokenizer, 64)
    dropped = load_pairs(path, tokenizer, 64, long_examples="drop")
    assert (len(dropped), dropped.sources[0].dropped) == (1, 1)
    cut = load_pairs(path, tokenizer, 64, long_examples="truncate")
    assert (len(cut), cut.sources[0].truncated) == (2, 1)
    assert cut.answers.num_positions(2) == 64


def test_all_that_is_wrong_with_pairs_is_said_at_once_with_the_option_that_helps(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    long = [PAIR | {"chosen": "yes " * number} for number in (400, 500, 300)]
    equal, odd = PAIR | {"rejected": "yes"}, PAIR | {"chosen": 1}
    a = write_rows(tmp_path / "a.jsonl", [*long[:2], PAIR, equal])
    b = write_rows(tmp_path / "b.jsonl", [equal, long[2], odd])
    options = DataConfig(train_data_path=(str(a), str(b)))
    with pytest.raises(UserError) as caught:
        training_pairs(options, tokenizer, 64, "error")
    first, second, third = re.split(r"(?<=\.) (?=\d|/)", str(caught.value))
    assert first.startswith(f"3 records ({a}:1, {a}:2, ...): the prompt and an answer have up to ")
    assert "choose --long-examples drop or truncate" in first
    assert second.startswith(f"2 records ({a}:4, {b}:1): `chosen` and `rejected` are the same; correct the pair, or")
    assert second.endswith("choose --dpo-bad-pairs skip.")
    assert third.startswith(f"{b}:3: `chosen` is a number, but")


def test_what_no_option_helps_is_said_also_where_bad_pairs_are_skipped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [PAIR | {"rejected": "yes"}, PAIR | {"chosen": 1}, PAIR | {"rejected": "no " * 400}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as caught:
        load_pairs(path, tokenizer, 64, bad_pairs="skip")
    assert f"{path}:2: `chosen` is a number" in str(caught.value)
    assert f"{path}:3: the prompt and an answer have " in str(caught.value)
    assert "are the same" not in str(caught.value)


def test_a_file_without_a_usable_pair_is_one_sentence(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", [PAIR | {"rejected": "yes"}])
    with pytest.raises(UserError, match="holds no pair to train on: all 1 were left out"):
        load_pairs(path, tokenizer, bad_pairs="skip")


def test_other_rules_about_bad_pairs_are_other_data(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", [PAIR])
    assert load_pairs(path, tokenizer).digest != load_pairs(path, tokenizer, bad_pairs="skip").digest


@pytest.mark.parametrize("name", ["ultrafeedback_train", "hh_mixed_norm", "dpo_en_demo_norm"])
def test_of_real_pairs_exactly_the_answers_are_trained(shared_data: Path, name: str) -> None:
    tokenizer = load_tokenizer(None, shared_data / "stories260K")
    path = shared_data / f"preference/{name}.jsonl"
    pairs = load_pairs(path, tokenizer, 1 << 20, "skip")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if row["chosen"] != row["rejected"]]
    kept = [row for row in kept if all(row[key][-1]["content"].strip() for key in ("chosen", "rejected"))]
    assert len(pairs) == len(kept)
    for pair in range(0, len(pairs), 7):
        for half, key in enumerate(("chosen", "rejected")):
            assert answer_of(pairs, tokenizer, 2 * pair + half).strip() == kept[pair][key][-1]["content"].strip()
