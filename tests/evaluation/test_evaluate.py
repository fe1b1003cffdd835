"""``hft-megatron evaluate`` from its words to its files, in every layout. Run: pytest tests/evaluation"""

from pathlib import Path
from typing import Any

import pytest

from tests.support.evaluations import COUNT, records_of, results_of, run_evaluate, words_of, write_all_kinds
from tests.support.models import LAYOUTS
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs

NUMBERS = ("log_probs", "nats", "statistics")
"""Of a record: what is compared within a tolerance. All else is equal."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, with its tokenizer, and ``tasks.yaml``."""
    folder = make_inputs(tmp_path_factory.mktemp("evaluated"))
    write_all_kinds(folder)
    return folder


@pytest.fixture(scope="module")
def alone(ranks: RankPools, inputs: Path) -> Path:
    """The result file of one process."""
    output = inputs / "alone" / "results.json"
    [answer] = ranks(1).run(run_evaluate, words=words_of(inputs / "tasks.yaml", output, inputs / "model", batch_size=3))
    assert answer["mistake"] is None
    return output


def assert_same_answers(output: Path, expected: Path, within: float) -> None:
    """Two result files of the same models, whatever their names, layouts and precisions."""
    records, others = records_of(output), records_of(expected)
    assert len(records) == len(others) > 0
    for record, other in zip(records, others, strict=True):
        for key in record.keys() - {"model"}:
            if key in NUMBERS:
                assert _flat(record[key]) == pytest.approx(_flat(other[key]), abs=within), (record, other)
            else:
                assert record[key] == other[key]
        assert record.keys() == other.keys()
    for model, of_expected in zip(results_of(output)["models"], results_of(expected)["models"], strict=True):
        for task, of_other in zip(model["tasks"], of_expected["tasks"], strict=True):
            assert task["values"] == pytest.approx(of_other["values"], rel=within)
            assert {**task, "values": None} == {**of_other, "values": None}


def _flat(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    return [number for each in value for number in _flat(each)] if isinstance(value, list) else [value]


def files_of(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.parent.iterdir()}


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ("tp2", 2),
        ("pp2", 2),
        pytest.param("tp2_pp2", 4, marks=pytest.mark.slow(reason="four ranks on two cores")),
    ],
)
def test_all_kinds_have_the_same_answers_in_every_layout(
    layout: str, size: int, ranks: RankPools, inputs: Path, alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    words = words_of(inputs / "tasks.yaml", output, inputs / "model", batch_size=3, **LAYOUTS[layout])
    answers = ranks(size).run(run_evaluate, words=words)
    assert [answer["mistake"] for answer in answers] == [None] * size
    assert_same_answers(output, alone, 1e-4)


def test_replicas_do_not_show_in_the_files(ranks: RankPools, inputs: Path, alone: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    ranks(2).run(run_evaluate, words=words_of(inputs / "tasks.yaml", output, inputs / "model", batch_size=3))
    assert files_of(output) == files_of(alone)


def test_what_was_cut_and_what_never_ended_is_counted(ranks: RankPools, inputs: Path, alone: Path) -> None:
    [model] = results_of(alone)["models"]
    tasks = {task["name"]: task for task in model["tasks"]}
    assert all(task["examples"] == COUNT for task in tasks.values())
    ended = [record["ended_by"] for record in records_of(alone) if record["task"] == "continued"]
    assert tasks["continued"]["counts"]["without_end"] == ended.count("length") > 0
    assert tasks["continued"]["counts"]["prompts_cut"] == 1
    assert tasks["chosen"]["counts"]["prompts_cut"] == 1
    assert tasks["texts"]["counts"]["windows"] > COUNT
