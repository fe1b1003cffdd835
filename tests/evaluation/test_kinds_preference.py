"""Pairs are those that dpo trains on, and the chosen answer should be the likelier one.

Run: pytest tests/evaluation/test_kinds_preference.py
"""

from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.data import DataConfig
from hft_megatron.data.loading import training_pairs
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import UserError
from hft_megatron.evaluation.kinds import KINDS
from tests.support.data_files import write_rows
from tests.support.preferences import write_pairs
from tests.support.tasks import asked, scored_texts, scores, task_of

PAIRS: dict[str, Any] = {"kind": "preference", "files": "a.jsonl"}
PAIR = {"prompt": "Say it: ", "chosen": "yes", "rejected": "no, never"}
BOTH = ["preference_accuracy", "preference_accuracy_per_token"]


def test_sequences_are_those_that_dpo_trains_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_pairs(tmp_path / "a.jsonl", 12)
    examples = asked(task_of(tmp_path, **PAIRS), tokenizer).examples
    pairs = training_pairs(DataConfig(train_data_path=(str(tmp_path / "a.jsonl"),)), tokenizer, 512, "error")
    assert pairs is not None
    assert len(examples) == 12
    for number, example in enumerate(examples):
        for half, (ids, scored) in enumerate(example.sequences):
            trained_ids, trained = pairs.answers.example(2 * number + half)
            assert ids.tolist() == trained_ids.tolist()
            assert scored.tolist() == trained.tolist()


def test_the_likelier_answer_counts_by_the_sum_and_by_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", [PAIR])
    task = task_of(tmp_path, **PAIRS, metrics=BOTH)
    (example,) = asked(task, tokenizer).examples
    assert scored_texts(example, tokenizer) == ["yes", "no, never"]  # and the end token
    chosen, rejected = (int(scored.sum()) for _, scored in example.sequences)
    assert chosen < rejected
    for log_probs, hits in (
        ((-2.0, -3.0), [1.0, float(2 / chosen < 3 / rejected)]),
        ((-3.0, -2.0), [0.0, 0.0]),
        ((-3.0, -3.0), [0.0, 0.0]),
        ((-3.0 * chosen, -3.0 * rejected), [1.0, 0.0]),
    ):
        record = KINDS["preference"].record(task, example, scores(example, *log_probs))
        assert [record["statistics"][name] for name in BOTH] == [[hit, 1.0] for hit in hits]
    assert record["example"] == "a.jsonl:1"


def test_pairs_that_are_none_are_counted_and_keys_that_are_not_read_are_named(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write_rows(tmp_path / "a.jsonl", [{**PAIR, "topic": 1}, {**PAIR, "chosen": " "}, {**PAIR, "rejected": "yes"}])
    found = asked(task_of(tmp_path, **PAIRS), tokenizer)
    assert len(found.examples) == 1
    assert found.counts == {"prompts_cut": 0, "prompt_tokens_cut": 0, "bad_pairs": 2}
    assert found.notes == (
        "made: keys that are not read: topic (1)",
        "made: pairs left out, whose answers are empty, the same or to different prompts: 2 of 3",
    )
    write_rows(tmp_path / "a.jsonl", [{**PAIR, "chosen": " "}])
    with pytest.raises(UserError, match="the task made is empty: all 1 pairs were left out"):
        asked(task_of(tmp_path, **PAIRS), tokenizer)


def test_records_are_read_with_the_options_of_dpo(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", [{"ask": "Say it", "good": "yes", "rejected": "no", "score": 3}])
    read = {"data_keys": "ask=prompt,good=chosen", "ignore_keys": "score", "prompt_separator": "\n"}
    (example,) = asked(task_of(tmp_path, **PAIRS, **read), tokenizer).examples
    assert tokenizer.decode(example.sequences[0][0].tolist()) == "Say it\nyes"
    with pytest.raises(UserError, match="good"):
        asked(task_of(tmp_path, **PAIRS, data_keys="ask=prompt"), tokenizer)
    write_rows(tmp_path / "a.jsonl", [PAIR])
    with pytest.raises(UserError, match=r"--data-keys x=chosen: no record of .*tasks\.yaml:1 has the key `x`"):
        asked(task_of(tmp_path, **PAIRS, data_keys="x=chosen"), tokenizer)


def test_the_limit_counts_records_and_later_ones_are_not_looked_at(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", [PAIR, {"prompt": "broken"}])
    assert len(asked(task_of(tmp_path, **PAIRS, limit=1), tokenizer).examples) == 1
    with pytest.raises(UserError, match=r"a\.jsonl:2: "):
        asked(task_of(tmp_path, **PAIRS), tokenizer)


def test_both_answers_to_a_long_prompt_lose_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", [{**PAIR, "prompt": "Say it again. " * 9}])
    (whole,) = asked(task_of(tmp_path, **PAIRS), tokenizer).examples
    longest = max(len(ids) for ids, _ in whole.sequences)
    with pytest.raises(UserError, match=rf"a\.jsonl:1: the prompt and the longer answer have {longest} tokens, but"):
        asked(task_of(tmp_path, **PAIRS), tokenizer, longest - 2)
    cut = asked(task_of(tmp_path, **PAIRS, cut_long_prompts=True), tokenizer, longest - 2)
    assert cut.counts["prompts_cut"] == 1
    for (ids, scored), (all_ids, all_scored) in zip(cut.examples[0].sequences, whole.sequences, strict=True):
        assert ids.tolist() == [all_ids[0], *all_ids[2:]]
        assert scored.sum() == all_scored.sum()


def test_answers_of_equal_tokens_are_no_pair(tmp_path: Path, tokenizer: Tokenizer) -> None:
    trimming = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim }}<|im_end|>{% endfor %}"
    trimming += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    halves = [[{"role": "assistant", "content": text}] for text in ("yes", " yes ", "no")]
    user = [{"role": "user", "content": "Say it"}]
    rows = [{"prompt": user, "chosen": halves[0], "rejected": rejected} for rejected in halves[1:]]
    write_rows(tmp_path / "a.jsonl", rows)
    found = asked(task_of(tmp_path, **PAIRS), tokenizer.with_facts(chat_template=trimming))
    assert [example.place for example in found.examples] == ["a.jsonl:2"]
    assert found.counts["bad_pairs"] == 1


def test_a_token_with_nothing_before_it_is_not_scored(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", [{"prompt": "", "chosen": "yes it is", "rejected": "no"}])
    (example,) = asked(task_of(tmp_path, **PAIRS), tokenizer.with_facts(bos_id=None)).examples
    for ids, scored in example.sequences:
        assert not scored[0]
        assert scored[1:].all()
        assert ids[0] != tokenizer.bos_id
