"""Tasks put to a model that trains: recorded, and without a trace in the training. Run: pytest tests/trainer"""

import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from hft_megatron.config.run import RunConfig
from hft_megatron.config.tracking import LoggingConfig, tasks_are_there
from hft_megatron.config.training import TrainingConfig
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import RankFailed, UserError
from hft_megatron.evaluation import answers
from hft_megatron.evaluation.examples import Generated
from hft_megatron.evaluation.outcomes import outcome_of
from hft_megatron.trainer import task_evaluation
from hft_megatron.trainer.task_evaluation import tasks_of_run
from tests.support.ranks import RankPools, RanksFailed
from tests.support.runs import Recorder, make_inputs, run_recorded, run_sft_words, words_for
from tests.support.shapes import tiny_shape
from tests.support.tokenizers import make_byte_level

TASKS = """
- {name: texts, kind: text, files: texts.txt, separator: "---"}
- {name: answers, kind: generate, files: questions.jsonl, prompt: question, target: answer, max_new_tokens: 8,
   temperature: 0.9, seed: 3, metrics: [exact_match, edit_similarity]}
"""


def write_tasks(folder: Path) -> Path:
    (folder / "texts.txt").write_text("One bridge.\n---\nTwo bridges are longer.\n---\nThree.\n")
    rows = [{"question": f"Say {number}", "answer": str(number)} for number in range(5)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.yaml").write_text(TASKS)
    return folder / "tasks.yaml"


@pytest.mark.parametrize(
    "layout",
    [
        ["--tensor-model-parallel-size", 2, "--sequence-parallel"],
        pytest.param(["--overlap-grad-reduce", "--overlap-param-gather", "--manual-gc"], marks=pytest.mark.slow),
    ],
    ids=["tp2_sp", "dp2_overlap"],
)
def test_tasks_are_recorded_and_leave_no_trace_in_the_training(
    layout: list[object], ranks: RankPools, tmp_path: Path
) -> None:
    inputs, tasks = make_inputs(tmp_path), write_tasks(tmp_path)
    words = words_for(inputs, "--hft-round-interval", 3, "--packing", *layout, "--seed", 7)
    without = ranks(2).run(run_sft_words, words=words)
    asked = [
        "--eval-tasks",
        str(tasks),
        "--eval-tasks-interval",
        "2",
        "--eval-on-start",
        "--save",
        str(tmp_path / "run"),
    ]
    answered = ranks(2).run(run_sft_words, words=[*words, *asked])
    for mine, theirs in zip(answered, without, strict=True):
        assert mine["state"] == theirs["state"]
        assert mine["steps"] == theirs["steps"]
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    of_tasks = {record["iteration"]: record for record in records if "tasks/texts/perplexity" in record}
    assert list(of_tasks) == [0, 2, 3, 4, 6], "the start, every second iteration, the end of a round and of the run"
    assert of_tasks[6]["tasks/texts/perplexity"] != of_tasks[2]["tasks/texts/perplexity"]
    assert {"tasks/texts/bits_per_byte", "tasks/answers/exact_match", "tasks/answers/edit_similarity"} < set(
        of_tasks[6]
    )


def run_with_failing(words: list[str], failing: str) -> dict[str, Any]:
    """A run in which the third step is followed by a task that fails: its memory is gone, or its logits are."""
    recorder = Recorder(kill_at=None, kill_rank=0)

    def outcome(*args: Any, **kwargs: Any) -> Any:
        if recorder.run.state.iteration == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
        return outcome_of(*args, **kwargs)

    def is_finite(answer: Any) -> bool:
        return recorder.run.state.iteration != 3 or isinstance(answer, Generated)

    module, name, replacement = (
        (task_evaluation, "outcome_of", outcome) if failing == "memory" else (answers, "_is_finite", is_finite)
    )
    with patch.object(module, name, replacement):
        try:
            return run_recorded("sft", words, recorder)
        except RankFailed as error:
            return {"error": str(error)}


def values_of(run: Path) -> dict[int, set[str]]:
    """Names of what was measured in tasks, by iteration; every iteration has one record of them."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [
        (record["iteration"], {name for name in record if name.startswith("tasks/")})
        for record in records
        if any(name.startswith("tasks/") for name in record)
    ]
    assert len({iteration for iteration, _ in found}) == len(found)
    return dict(found)


@pytest.mark.slow
def test_a_task_without_memory_costs_no_checkpoint_and_is_evaluated_by_the_resumed_run(
    ranks: RankPools, tmp_path: Path
) -> None:
    inputs, tasks, run = make_inputs(tmp_path), write_tasks(tmp_path), tmp_path / "run"
    words = words_for(inputs, "--eval-tasks", tasks, "--eval-tasks-interval", 3, "--save", run, "--save-interval", 3)
    [answer] = ranks(1).run(run_with_failing, words=words, failing="memory")
    assert re.match(
        r"rank 0 on \S+ \(TP 0, PP 0, DP 0\) ran out of memory while evaluating tasks after iteration 3 \(allocating "
        r"2.00 GiB failed\); give an --eval-tasks-batch-size below \d+, or leave --eval-tasks out and",
        answer["error"],
    ), answer["error"]
    assert (run / "iter_0000003").is_dir()
    assert values_of(run) == {}
    resumed = [*words, "--load", str(run), "--eval-tasks-batch-size", "1"]
    ranks(1).run(run_sft_words, words=resumed)
    before = (run / "metrics.jsonl").read_bytes()
    assert list(values_of(run)) == [3, 6]
    # Finished, and started again: with the same tasks, and with one that has no values yet.
    ranks(1).run(run_sft_words, words=resumed)
    assert (run / "metrics.jsonl").read_bytes() == before
    tasks.write_text(TASKS.replace("name: texts", "name: more_texts"))
    ranks(1).run(run_sft_words, words=resumed)
    assert (run / "metrics.jsonl").read_bytes() != before


def test_a_task_whose_logits_are_no_numbers_is_left_out_and_the_run_continues(ranks: RankPools, tmp_path: Path) -> None:
    inputs, tasks, run = make_inputs(tmp_path), write_tasks(tmp_path), tmp_path / "run"
    words = words_for(inputs, "--eval-tasks", tasks, "--eval-tasks-interval", 3, "--save", run)
    [answer] = ranks(1).run(run_with_failing, words=words, failing="numbers")
    [said] = [line for line in answer["said"] if "no values" in line]
    assert said.startswith("> warning: iteration 3 has no values of the task texts, because the model's logits are no")
    assert len(answer["steps"]) == 6
    of_answers = {"tasks/answers/exact_match", "tasks/answers/edit_similarity"}
    assert values_of(run) == {3: of_answers, 6: of_answers | {"tasks/texts/perplexity", "tasks/texts/bits_per_byte"}}


def test_a_mistake_in_a_tasks_file_is_said_before_a_model_is_built(ranks: RankPools, tmp_path: Path) -> None:
    inputs, tasks = make_inputs(tmp_path), write_tasks(tmp_path)
    tasks.write_text(TASKS.replace("prompt: question", "prompt: query"))
    with pytest.raises(RanksFailed, match="query"):
        ranks(1).run(run_sft_words, words=words_for(inputs, "--eval-tasks", tasks))


def test_a_tasks_file_that_is_not_there_is_named_with_the_option_of_training(tmp_path: Path) -> None:
    config = RunConfig(logging=LoggingConfig(eval_tasks=str(tmp_path / "none.yaml")))
    tokenizer = load_tokenizer(None, make_byte_level(tmp_path))
    with pytest.raises(UserError, match=r"^--eval-tasks .*none\.yaml cannot be read"):
        tasks_of_run(config, tokenizer, tiny_shape(2))


def test_options_about_tasks_have_tasks_and_a_training() -> None:
    shape = tiny_shape(2)
    for config, sentence in (
        (RunConfig(logging=LoggingConfig(eval_tasks_interval=5)), "--eval-tasks-interval 5 needs --eval-tasks"),
        (
            RunConfig(logging=LoggingConfig(eval_tasks="t.yaml"), training=TrainingConfig(train_iters=0)),
            "hft-megatron evaluate --model MODEL --tasks t.yaml",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            tasks_are_there(config, shape, 1)
