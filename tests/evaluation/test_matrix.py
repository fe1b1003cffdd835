"""The score matrix, against values computed by hand. Run: pytest tests/evaluation/test_matrix.py"""

import json
from pathlib import Path

import pytest

from hft_megatron.errors import UserError
from hft_megatron.evaluation.matrix import Cell, Column, ScoreMatrix, cell_of
from hft_megatron.evaluation.measures import MEASURES
from hft_megatron.report.continual import matrix_text

Values = dict[tuple[int, str], float]


def column(name: str, measure: str = "exact_match", digest: str = "") -> Column:
    return Column(name=name, digest=digest or f"digest of {name}", measure=measure)


TASKS = [column("a"), column("b", "rouge_l"), column("c", "sari")]
GENERAL = [column("maths", "accuracy"), column("text", "bits_per_byte")]
SCORES: Values = {
    (0, "a"): 10, (0, "b"): 20, (0, "c"): 30, (0, "maths"): 40, (0, "text"): 1.5,
    (1, "a"): 90, (1, "b"): 26,
    (2, "a"): 60, (2, "b"): 80, (2, "c"): 21, (2, "maths"): 44, (2, "text"): 1.75,
    (3, "a"): 0, (3, "b"): 86, (3, "c"): 70, (3, "maths"): 25, (3, "text"): 2.75,
}  # fmt: skip
"""After the third task nothing is left of the first."""


def matrix_of(scores: Values, tasks: list[Column] | None = None, general: list[Column] | None = None) -> ScoreMatrix:
    matrix = ScoreMatrix(TASKS if tasks is None else tasks, GENERAL if general is None else general)
    for (after, name), value in scores.items():
        matrix.put(after, name, Cell(value=value, examples=100, counts={"without_end": after}))
    return matrix


def without(*places: tuple[int, str]) -> Values:
    return {place: value for place, value in SCORES.items() if place not in places}


def test_the_scores_are_those_computed_by_hand() -> None:
    summary = matrix_of(SCORES).summary()
    assert summary.tasks == 3
    assert summary.op == 52  # (0 + 86 + 70) / 3
    assert summary.bwt == -28  # (0 - 90 + 86 - 80 + 0) / 3
    assert summary.bwt_over_t_minus_1 == -42  # the same / 2
    assert summary.forgetting == {"a": 90, "b": 0, "c": 0}
    assert summary.forward_transfer == {"b": 6, "c": -9}
    assert summary.general_changes == {"maths": -15, "text": 1.25}
    assert summary.general_delta == -15  # bits aren't on the scale of 0 to 100


def test_a_sequence_under_way_is_scored_up_to_where_it_is() -> None:
    summary = matrix_of({place: value for place, value in SCORES.items() if place[0] < 3}).summary()
    assert (summary.tasks, summary.op, summary.bwt, summary.bwt_over_t_minus_1) == (2, 70, -15, -30)
    assert summary.forgetting == {"a": 30, "b": 0}
    assert (summary.general_changes, summary.general_delta) == ({"maths": 4, "text": 0.25}, 4)


def test_one_task_has_no_score_over_t_minus_1() -> None:
    summary = matrix_of({(0, "a"): 10, (1, "a"): 90}).summary()
    assert (summary.tasks, summary.op, summary.bwt, summary.bwt_over_t_minus_1) == (1, 90, 0, None)
    assert (summary.forgetting, summary.forward_transfer) == ({"a": 0}, {})


def test_the_base_alone_has_no_scores() -> None:
    summary = matrix_of({(0, "a"): 10, (0, "maths"): 40}).summary()
    assert (summary.tasks, summary.op, summary.bwt, summary.bwt_over_t_minus_1) == (0, None, None, None)
    assert summary.general_changes == {"maths": 0, "text": None}


def test_what_misses_a_cell_is_none_and_all_else_is_there() -> None:
    missing = matrix_of(without((1, "a"), (0, "c"), (0, "maths"))).summary()
    assert (missing.op, missing.bwt, missing.bwt_over_t_minus_1) == (52, None, None)
    assert missing.forgetting == {"a": None, "b": 0, "c": 0}
    assert missing.forward_transfer == {"b": 6, "c": None}
    assert (missing.general_changes, missing.general_delta) == ({"maths": None, "text": 1.25}, None)
    assert matrix_of(without((3, "b"))).summary().op is None
    # The best score may be the one that isn't there.
    assert matrix_of(without((2, "a"))).summary().forgetting["a"] is None


def test_forgetting_begins_at_the_best_score_since_the_task_was_learned() -> None:
    scores = {**SCORES, (0, "b"): 99, (1, "b"): 98, (2, "a"): 95}
    assert matrix_of(scores).summary().forgetting == {"a": 95, "b": 0, "c": 0}


def test_a_value_that_is_no_finite_number_is_none() -> None:
    scores = matrix_of(SCORES)
    scores.put(3, "text", cell_of({"perplexity": float("inf"), "bits_per_byte": 2.5}, "perplexity", 5, {}))
    assert scores.summary().general_changes["text"] is None
    assert scores.cell(3, "text") == Cell(value=None, examples=5, beside={"bits_per_byte": 2.5})


def test_divergences_from_the_base_are_those_after_the_last_task() -> None:
    scores = matrix_of(SCORES)
    assert scores.summary().kl == {}
    for after in (2, 3):
        values = {"bits_per_byte": 2.0, "kl_base_tuned": after / 10, "kl_tuned_base": after / 20}
        scores.put(after, "text", cell_of(values, "bits_per_byte", 5, {}))
    assert scores.summary().kl == {"text": {"kl_base_tuned": 0.3, "kl_tuned_base": 0.15}}
    assert "text: KL(base || tuned) 0.3, KL(tuned || base) 0.15 nats per token" in matrix_text(scores.contents())


def test_the_measures_of_a_sequence_are_those_from_0_to_100() -> None:
    # What `is_of_hundred` rests on.
    for name, measure in MEASURES.items():
        if measure.statistics is not None and measure.higher_is_better:
            right = measure.statistics("one two three four", ["one two three four"], "one two three")
            wrong = measure.statistics("5", ["one two three four"], "one two three")
            assert measure.total(right) == pytest.approx(100), name
            assert 0 <= measure.total(wrong) < 60, name
        elif measure.higher_is_better:
            assert (measure.unit, measure.total([1, 1])) == ("%", 100), name
    with pytest.raises(UserError, match=r"the task t has the measure perplexity, but .* choose one of accuracy, "):
        ScoreMatrix([column("t", "perplexity")])


def test_a_task_that_is_there_twice_is_refused() -> None:
    for general in ([], [column("a")]):
        tasks = [column("a"), column("b")] if general else [column("a"), column("a")]
        with pytest.raises(UserError, match="the task a is used twice in the sequence or beside it; rename one"):
            ScoreMatrix(tasks, general)


def test_a_matrix_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "matrix.json"
    scores = {**without((1, "a")), (3, "text"): 1 / 3}
    matrix_of(scores).write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["matrix.json"]
    read = ScoreMatrix.read(path)
    assert read.contents() == matrix_of(scores).contents() == json.loads(path.read_text())
    assert read.cell(3, "text") == Cell(value=1 / 3, examples=100, counts={"without_end": 3})
    assert (read.cell(1, "a"), read.done) == (None, 3)
    rows = json.loads(path.read_text())["rows"]
    assert [row["after"] for row in rows] == [None, "a", "b", "c"]
    assert rows[1]["cells"] == {"b": {"value": 26, "examples": 100, "counts": {"without_end": 1}, "beside": {}}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"format": 1, "tas', "is no score matrix"),
        ("[]", "is no score matrix"),
        ('{"format": 2}', "has format 2, but this version reads 1"),
        ('{"format": 1, "tasks": [], "general": [], "rows": [{"after": "a", "cells": {}}]}', "row 0 is of 'a'"),
        ('{"format": 1, "tasks": [], "general": [], "rows": [{"after": null, "cells": {"a": 5}}]}', "no score matrix"),
    ],
)
def test_a_file_that_is_no_matrix_is_named(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "matrix.json"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        ScoreMatrix.read(path)
    with pytest.raises(UserError, match="is no score matrix"):
        ScoreMatrix.read(tmp_path / "none.json")


def test_a_sequence_resumes_with_other_tasks_after_those_that_are_done() -> None:
    held = matrix_of({place: value for place, value in SCORES.items() if place[0] < 2})
    tasks = [TASKS[0], column("d"), column("b", "rouge_l"), column("c", "sari", "other")]
    resumed, notes = held.resumed(tasks, [*GENERAL, column("more", "perplexity")], Path("matrix.json"))
    assert resumed.tasks == tuple(tasks)
    assert resumed.cell(1, "a") == held.cell(1, "a")
    assert resumed.cell(0, "b") == held.cell(0, "b")
    assert (resumed.cell(0, "c"), resumed.cell(0, "more")) == (None, None)
    assert notes == ("cells of matrix.json left out, because their tasks have changed since: 1",)
    again, notes = resumed.resumed(tasks, GENERAL, Path("matrix.json"))
    assert (notes, again.cell(0, "maths")) == ((), held.cell(0, "maths"))


@pytest.mark.parametrize(
    ("tasks", "general", "sentence"),
    [
        (TASKS[:2], GENERAL, "the sequence has 2 tasks, but that of matrix.json has 3; give them all"),
        ([TASKS[1], TASKS[0], TASKS[2]], GENERAL, "task 1 of matrix.json, which is done, was a, and is b now; restore"),
        ([TASKS[0], column("b", "rouge_l", "new"), TASKS[2]], GENERAL, "was b with other settings or files; restore"),
        (
            [TASKS[0], Column(name="b", digest="digest of b", measure="bleu"), TASKS[2]],
            GENERAL,
            "was b with the measure rouge_l; restore",
        ),
        (TASKS, GENERAL[:1], "the general task of matrix.json was text, and no longer exists; restore it"),
        (TASKS, [column("maths", "accuracy", "new"), GENERAL[1]], "was maths with other settings or files"),
    ],
)
def test_what_is_done_stays_as_it_was(tasks: list[Column], general: list[Column], sentence: str) -> None:
    held = matrix_of({place: value for place, value in SCORES.items() if place[0] < 3})
    with pytest.raises(UserError, match=sentence):
        held.resumed(tasks, general, Path("matrix.json"))
