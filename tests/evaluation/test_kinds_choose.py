"""Choices are cut from their prompt where generation would start, and the likeliest is compared with the answer.

Run: pytest tests/evaluation/test_kinds_choose.py
"""

import math
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.data.chat import ChatTemplate, LossRule
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import UserError
from hft_megatron.evaluation.kinds import KINDS
from tests.support.data_files import load, write_rows
from tests.support.tasks import asked, scored_texts, scores, task_of

CHOOSING: dict[str, Any] = {"kind": "choose", "files": "a.jsonl", "prompt": "q", "choices": "c", "answer": "a"}
ROW = {"q": "1+1?", "c": ["1", "two", "3"], "a": "two"}
METRICS = ["accuracy", "accuracy_per_token", "accuracy_per_byte", "probability"]


def right_of(folder: Path, tokenizer: Tokenizer, row: dict[str, Any], **settings: Any) -> list[int]:
    write_rows(folder / "a.jsonl", [row])
    (example,) = asked(task_of(folder, **{**CHOOSING, **settings}), tokenizer).examples
    right: list[int] = example.facts["right"]
    return right


def test_a_choice_has_the_tokens_that_training_makes_of_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", [ROW])
    (example,) = asked(task_of(tmp_path, **CHOOSING, target_delimiter=" "), tokenizer).examples
    assert scored_texts(example, tokenizer) == [" 1", " two", " 3"]
    for choice, (ids, scored) in zip(ROW["c"], example.sequences, strict=True):
        write_rows(tmp_path / "train.jsonl", [{"prompt": "1+1?", "completion": f" {choice}"}])
        whole, trained = load(tmp_path / "train.jsonl", tokenizer).example(0)
        assert whole.tolist() == [*ids.tolist(), tokenizer.eos_id]
        assert trained.tolist() == [*scored.tolist(), True]


def test_in_a_chat_a_choice_is_the_assistants_text_without_the_token_that_ends_it(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write_rows(tmp_path / "a.jsonl", [ROW])
    (example,) = asked(task_of(tmp_path, **CHOOSING, chat=True), tokenizer).examples
    assert scored_texts(example, tokenizer) == ["1", "two", "3"]
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "two"}]
    ((ids, trained),) = tokenizer.encode_pieces([ChatTemplate(tokenizer.facts, LossRule()).pieces(messages)])
    size = len(example.sequences[1][0])
    assert example.sequences[1][0].tolist() == ids[:size].tolist()
    assert int(trained.sum()) == int(example.sequences[1][1].sum()) + 1


def test_the_answer_is_a_text_a_number_or_a_letter(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def right(answer: Any, choices: Any = ROW["c"], /, **settings: Any) -> list[int]:
        return right_of(tmp_path, tokenizer, {**ROW, "c": choices, "a": answer}, **settings)

    assert [right(answer) for answer in ("two", " two ", 1, "B", "b", True)] == [[1]] * 6
    assert right("2") == [2]
    assert right("3") == [2]
    assert right(["A", "3"]) == [0, 2]
    assert right(0, ["2", "1", "0"]) == [0]
    assert right("D", ["A", "D"]) == [1]
    assert right(None, {"choices": ["x", "y", "z"], "labels": [1, 0, 1]}, answer=None) == [0, 2]
    assert right("1", choices=["{{ q }}", "none"]) == [1]
    assert right("C", answer="{{ 'AB'[c.index('two')] }}") == [1]


def test_without_a_begin_token_a_choice_needs_a_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", [ROW, {**ROW, "q": ""}])
    task, without = task_of(tmp_path, **CHOOSING), tokenizer.with_facts(bos_id=None)
    assert len(asked(task, tokenizer).examples) == 2
    with pytest.raises(UserError, match=r"a\.jsonl:2: the prompt is empty, so the first token of a choice cannot be"):
        asked(task, without)


def test_several_columns_and_literal_texts_are_choices(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", [{"q": "x", "A": "left", "B b": "right", "a": "B"}])
    task = task_of(tmp_path, **{**CHOOSING, "choices": ["{{ A }}", "{{ row['B b'] }}", "no"]})
    (example,) = asked(task, tokenizer).examples
    assert scored_texts(example, tokenizer) == ["left", "right", "no"]
    assert example.facts["right"] == [1]


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "none of them": (
        {"a": "four"},
        {},
        r"a\.jsonl:1: the answer 'four' is none of the 3 choices \('1', 'two', '3'\): n",
    ),
    "too high": ({"a": 3}, {}, r"answer 3 is none of the 3 choices.* a number from 0 to 2, nor a letter from A to C\."),
    "negative": ({"a": -1}, {}, r"answer -1 is none"),
    "a letter too high": ({"a": "D"}, {}, r"answer 'D' is none"),
    "two meanings": (
        {"c": ["1", "0"], "a": "1"},
        {},
        r"the answer 1 is the text of choice 0 and the number of another;",
    ),
    "no right one": ({"a": []}, {}, r"a\.jsonl:1: no choice is marked as right"),
    "an empty choice": ({"c": ["1", " "]}, {}, r"a\.jsonl:1: choice 2 of 2 is empty"),
    "one choice": ({"c": ["two"]}, {}, r"`choices` needs at least two texts that differ"),
    "one choice, twice": ({"c": ["two", "two"]}, {}, r"`choices` needs at least two texts that differ"),
    "no choice": ({"c": []}, {}, r"`choices` needs at least two texts that differ"),
    "no list": ({"c": "two"}, {}, r"a\.jsonl:1: `choices` is text, but it must be a list of texts"),
    "no column": (
        {},
        {"choices": "d"},
        r"a\.jsonl:1: `choices` is d, but there is no such column; the columns are q, c,",
    ),
    "no answer": ({}, {"answer": None}, r"tasks\.yaml:1: the task made has no `answer`"),
    "labels": (
        {"c": {"choices": ["x", "y"], "labels": [1]}},
        {},
        r"`labels` must be a list with 0 or 1 for each of the 2",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_choices_and_answers_that_are_none_are_said_with_their_place(
    tmp_path: Path, tokenizer: Tokenizer, mistake: str
) -> None:
    row, settings, sentence = WRONG[mistake]
    with pytest.raises(UserError, match=sentence):
        right_of(tmp_path, tokenizer, {**ROW, **row}, **settings)


def test_a_text_that_is_there_twice_is_one_choice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Rounding would choose between two, and another layout another one."""
    row = {"q": "1+1?", "c": ["1", "two", "1", "3"]}
    write_rows(tmp_path / "a.jsonl", [{**row, "a": 2}, {**row, "a": "D"}, ROW])
    read = asked(task_of(tmp_path, **CHOOSING), tokenizer)
    assert [example.facts["choices"] for example in read.examples] == [["1", "two", "3"]] * 3
    assert [example.facts["right"] for example in read.examples] == [[0], [2], [1]]
    assert [len(example.sequences) for example in read.examples] == [3, 3, 3]
    assert "choices of the same text count as one, in 2 of 3 rows" in read.notes
    marked = {"q": "?", "c": {"choices": ["x", "y", "x"], "labels": [1, 0, 1]}}
    assert right_of(tmp_path, tokenizer, marked, answer=None) == [0]


def test_measures_choose_by_the_sum_by_tokens_and_by_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", [{"q": "Say:", "c": ["é", "abcdefgh", "zz zz"], "a": ["é", "abcdefgh"]}])
    task = task_of(tmp_path, **CHOOSING, target_delimiter=" ", metrics=METRICS)
    (example,) = asked(task, tokenizer).examples
    assert example.facts["bytes"] == [2, 8, 5]
    first, second, third = (int(scored.sum()) for _, scored in example.sequences)
    log_probs = (-6.0, -7.0, -3.0)
    record = KINDS["choose"].record(task, example, scores(example, *log_probs))
    weights = [math.exp(value) for value in log_probs]
    per_token = [-6.0 / first, -7.0 / second, -3.0 / third]
    assert record["prediction"] == 2
    assert record["right"] == [0, 1]
    statistics = record["statistics"]
    assert statistics["accuracy"] == [0.0, 1.0]
    assert statistics["accuracy_per_token"] == [float(per_token.index(max(per_token)) in (0, 1)), 1.0]
    assert statistics["accuracy_per_byte"] == [0.0, 1.0]  # -3, -0.875 and -0.6 per byte
    assert statistics["probability"] == [pytest.approx(sum(weights[:2]) / sum(weights)), 1.0]
    record = KINDS["choose"].record(task, example, scores(example, -6.0, -4.0, -3.0))
    assert record["statistics"]["accuracy_per_byte"] == [1.0, 1.0]
    record = KINDS["choose"].record(task, example, scores(example, -9000.0, -9001.0, -9002.0))
    assert 0.9 < record["statistics"]["probability"][0] < 0.92


def test_all_choices_of_a_long_prompt_lose_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", [{"q": "What is it? " * 9, "c": ["x", "a long one"], "a": "A"}])
    (whole,) = asked(task_of(tmp_path, **CHOOSING), tokenizer).examples
    longest = max(len(ids) for ids, _ in whole.sequences)
    assert asked(task_of(tmp_path, **CHOOSING), tokenizer, longest - 1).counts["prompts_cut"] == 0
    with pytest.raises(
        UserError, match=rf"a\.jsonl:1: the prompt and the longest choice have {longest} tokens, but .* "
    ):
        asked(task_of(tmp_path, **CHOOSING), tokenizer, longest - 2)
    cut = asked(task_of(tmp_path, **CHOOSING, cut_long_prompts=True), tokenizer, longest - 4)
    assert cut.counts == {"prompts_cut": 1, "prompt_tokens_cut": 3}
    for (ids, scored), (all_ids, all_scored) in zip(cut.examples[0].sequences, whole.sequences, strict=True):
        assert ids.tolist() == [all_ids[0], *all_ids[4:]]
        assert scored.tolist() == [all_scored[0], *all_scored[4:]]


def test_few_shot_examples_have_their_right_choice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path / "a.jsonl", [ROW, {"q": "2+2?", "c": ["4", "5"], "a": "A"}])
    task = task_of(tmp_path, **CHOOSING, fewshot=1, target_delimiter=" ")
    first, second = asked(task, tokenizer).examples
    assert tokenizer.decode(first.sequences[0][0].tolist()) == "2+2? 4\n\n1+1? 1"
    assert tokenizer.decode(second.sequences[1][0].tolist()) == "1+1? two\n\n2+2? 5"
