"""Tasks put to a model that trains: recorded, and without a trace in the training. Run: pytest tests/trainer"""

import json
from pathlib import Path

import pytest

from hft_megatron.config.run import RunConfig
from hft_megatron.config.tracking import LoggingConfig, tasks_are_there
from hft_megatron.config.training import TrainingConfig
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from hft_megatron.trainer.task_evaluation import tasks_of_run
from tests.support.ranks import RankPools, RanksFailed
from tests.support.runs import make_inputs, run_sft_words, words_for
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
