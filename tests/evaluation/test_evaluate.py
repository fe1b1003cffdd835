"""``hft-megatron evaluate`` from its words to its files, in every layout. Run: pytest tests/evaluation"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hft_megatron.cli import main
from hft_megatron.errors import EXIT_OK
from hft_megatron.report.evaluation import results_text
from tests.support.evaluations import COUNT, records_of, results_of, run_evaluate, words_of, write_all_kinds
from tests.support.models import LAYOUTS
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for

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
    """Two result files of the same models, whatever their layouts."""
    assert_same_records(records_of(output), records_of(expected), within)
    for model, of_expected in zip(results_of(output)["models"], results_of(expected)["models"], strict=True):
        for task, of_other in zip(model["tasks"], of_expected["tasks"], strict=True):
            assert task["values"] == pytest.approx(of_other["values"], rel=within)
            assert {**task, "values": None} == {**of_other, "values": None}


def assert_same_records(records: list[dict[str, Any]], expected: list[dict[str, Any]], within: float) -> None:
    """Whatever the names of the models."""
    assert len(records) == len(expected) > 0
    for record, other in zip(records, expected, strict=True):
        assert record.keys() == other.keys()
        for key in record.keys() - {"model"}:
            if key in NUMBERS:
                assert _flat(record[key]) == pytest.approx(_flat(other[key]), abs=within), (record, other)
            else:
                assert record[key] == other[key]


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
        pytest.param("pp2", 2, marks=pytest.mark.slow),
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


@pytest.fixture(scope="module")
def run(ranks: RankPools, inputs: Path) -> Path:
    """A run that was saved at TP 2, without what its round froze, with exports in ``hf/iter_...`` beside it."""
    saves = ["--save", inputs / "run", "--save-interval", 2, "--save-trained-only"]
    saves += ["--save-hf", inputs / "hf", "--save-hf-interval", 2, "--tensor-model-parallel-size", 2]
    ranks(2).run(run_sft_words, words=words_for(inputs, "--train-iters", 4, *saves))
    return inputs / "run"


@pytest.fixture(scope="module")
def beside(ranks: RankPools, inputs: Path, run: Path) -> tuple[Path, str]:
    """The result file of the run, its exports, an earlier checkpoint and its source, at PP 2; and the table."""
    models = [run, inputs / "hf", run / "iter_0000002", inputs / "hf" / "iter_0000002", inputs / "model"]
    output = inputs / "beside" / "results.json"
    words = words_of(inputs / "tasks.yaml", output, *models, batch_size=3, pipeline_model_parallel_size=2)
    answers = ranks(2).run(run_evaluate, words=words)
    assert answers[0]["mistake"] is None
    assert answers[0]["said"][-1].startswith("  task")
    return output, answers[0]["said"][-1]


@pytest.mark.slow(reason="a run and three models")
def test_a_run_and_its_checkpoints_are_evaluated_as_their_exports(
    inputs: Path, run: Path, beside: tuple[Path, str], alone: Path
) -> None:
    of_model = {str(run): 4, str(run / "iter_0000002"): 2}
    models = {model["name"]: model for model in results_of(beside[0])["models"]}
    assert {name: model["iteration"] for name, model in models.items() if model["iteration"]} == of_model
    records = {name: [one for one in records_of(beside[0]) if one["model"] == name] for name in models}
    for name, iteration in of_model.items():
        export = inputs / "hf" / ("" if iteration == 4 else "iter_0000002")
        assert_same_records(records[name], records[str(export)], 1e-6)
        assert models[name]["tokenizer_digest"] == models[str(export)]["tokenizer_digest"]
    assert_same_records(records[str(inputs / "model")], records_of(alone), 1e-4)
    nats = [sum(one["nats"] for one in records[name] if "nats" in one) for name in models]
    assert len({round(value, 3) for value in nats}) == 3, "training changed the model twice"


def test_models_stand_side_by_side_with_paired_intervals(
    inputs: Path, run: Path, beside: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    output, table = beside
    of_export = [line for line in table.splitlines() if line.split()[:1] == [str(inputs / "hf")]]
    assert len(of_export) == 11, "all measures of all tasks"
    assert all(line.endswith(" 0 [0, 0]") for line in of_export)
    assert main(["evaluate", "--compare", f"{output}:{run}", f"{output}:{inputs / 'model'}"]) == EXIT_OK
    compared = [re.sub(r" \(\w+\)|\(%\)", "", line).split() for line in capsys.readouterr().out.splitlines()[1:]]
    of_base = [line for line in table.splitlines() if line.split()[:1] == [str(inputs / "model")]]
    assert [" ".join(words[4:7]) for words in compared[: len(of_base)]] == [
        " ".join(line.split()[-3:]) for line in of_base
    ]
    assert any("bits_per_byte" in words and words[-1] == "first" for words in compared), "the run has learned"


def run_apart(words: list[list[str]]) -> dict[str, Any]:
    """Every rank is given words of its own."""
    return run_evaluate(words[int(os.environ["RANK"])])


def test_ranks_that_read_something_else_say_so_before_a_model_is_built(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    words = words_of(inputs / "tasks.yaml", tmp_path / "results.json", inputs / "model")
    answers = ranks(2).run(run_apart, words=[words, [*words, "--limit", "3"]])
    said = "rank 1 found other questions, tasks than rank 0; every rank must see the same models and data: use storage"
    assert [answer["mistake"].startswith(said) for answer in answers] == [True, True]
    assert not any("a LLaMA of" in line for answer in answers for line in answer["said"])


def test_fewer_examples_than_replicas_and_an_empty_answer(
    ranks: RankPools, inputs: Path, alone: Path, tmp_path: Path
) -> None:
    expected = [record for record in records_of(alone) if record["example"].endswith(":1")]
    [first] = [record["prediction"] for record in expected if record["task"] == "continued"]
    text = (inputs / "tasks.yaml").read_text().replace("this never comes", json.dumps(first[0]))
    tasks, output = inputs / "stopped.yaml", tmp_path / "results.json"
    tasks.write_text(text)
    ranks(2).run(run_evaluate, words=words_of(tasks, output, inputs / "model", batch_size=1, limit=1))
    [stopped, *others] = records_of(output)
    assert (stopped["prediction"], stopped["ended_by"]) == ("", "stop string")
    assert set(stopped["statistics"]["edit_similarity"]) == {0.0, 1.0}
    [model] = results_of(output)["models"]
    assert model["tasks"][0]["counts"]["without_answer"] == 1
    assert_same_records(others, expected[1:], 1e-4)


@pytest.mark.parametrize("task", ["continued", "drawn", "texts"])
def test_logits_that_are_no_numbers_fail_the_evaluation_in_words(
    task: str, ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(inputs / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    output = tmp_path / "out" / "results.json"
    words = words_of(inputs / "tasks.yaml", output, tmp_path / "model", task_names=task)
    for answer in ranks(2).run(run_evaluate, words=words):
        assert answer["failure"].startswith(f"{task}: the model's logits are not finite; read the model as fp32")
    assert [path.name for path in output.parent.iterdir()] == ["results.json.unfinished.jsonl"]


def test_models_with_other_examples_or_tokens_are_not_paired() -> None:
    def model(name: str, tokenizer: str, questions: str = "q") -> dict[str, Any]:
        values = {"perplexity": 2.0, "bits_per_byte": 1.0}
        tasks = [{"name": "t", "questions": questions, "values": values, "examples": 2, "counts": {"windows": 3}}]
        return {"name": name, "tokenizer_digest": tokenizer, "tasks": tasks}

    def records(*places: str) -> list[dict[str, Any]]:
        statistics = {"perplexity": [3.0, 4.0], "bits_per_byte": [3.0, 12.0]}
        return [{"example": place, "statistics": statistics} for place in places]

    models = [model("a", "x"), model("b", "y"), model("c", "x")]
    read = {("a", "t"): records("1", "2"), ("b", "t"): records("1", "2"), ("c", "t"): records("1", "3")}
    longer = results_text([models[0], model("b", "x", "more")], read).splitlines()
    assert all(line.endswith("other windows") for line in (longer[2], longer[4]))
    ends = [" ".join(line.split()[-2:]) for line in results_text(models, read).splitlines()[1:7]]
    assert [ends[number] for number in (1, 2, 4, 5)] == ["other tokens", "other examples", "[0, 0]", "other examples"]


@pytest.mark.slow
def test_weights_alone_are_compared_without_a_tokenizer_also_where_the_base_is_zero(
    inputs: Path, ranks: RankPools, tmp_path: Path
) -> None:
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((inputs / "model/config.json").read_text())
    weights = load_file(inputs / "model/model.safetensors")
    save_file(weights, tmp_path / "tuned/model.safetensors", metadata={"format": "pt"})
    zero = "model.layers.1.mlp.down_proj"
    weights[f"{zero}.weight"] = torch.zeros_like(weights[f"{zero}.weight"])
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    words = ["--model", tmp_path / "tuned", "--base", tmp_path / "base", "--output", tmp_path / "r.json"]
    ranks(2).run(run_evaluate, words=[str(word) for word in words])
    [changes] = [model["weight_changes"] for model in results_of(tmp_path / "r.json")["models"]]
    assert changes["units"][zero] is None
    assert {value for unit, value in changes["units"].items() if unit != zero} == {0.0}


def run_without_memory(words: list[str]) -> dict[str, Any]:
    """The model's first batch asks for more than any host has."""
    from unittest.mock import patch

    import torch

    from hft_megatron.evaluation.forward import ModelInPlace

    with patch.object(ModelInPlace, "read", lambda *_: torch.empty(1 << 60, dtype=torch.uint8)):
        return run_evaluate(words)


def test_a_batch_that_is_too_large_for_the_memory_is_a_sentence(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    words = words_of(inputs / "tasks.yaml", tmp_path / "results.json", inputs / "model", batch_size=512)
    [answer] = ranks(1).run(run_without_memory, words=words)
    assert answer["failure"].startswith(
        "rank 0 ran out of memory at --batch-size 512; give a smaller one, or spread the"
    )
