"""Which tasks a sequence has, with which options, and mistakes in it. Run: pytest tests/methods/continual"""

import json
from pathlib import Path

import pytest

from hft_megatron.cli import main
from hft_megatron.config.continual import sequence_fits_the_run
from hft_megatron.errors import EXIT_USAGE, UserError
from hft_megatron.evaluation.trace import TRACE
from hft_megatron.methods.continual.tasks import ContinualTask, read_continual_tasks
from tests.support.sequences import NAMES, SEQUENCE, options_of, write_sequence


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_sequence(tmp_path)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two of TRACE's tasks, made in another order, and its replay data."""
    for name in ("FOMC", "C-STANCE", "Lima"):
        (tmp_path / "trace" / name).mkdir(parents=True)
        for split in ("train", "eval", "test"):
            rows = [{"prompt": f"{name} {number}:", "answer": "A"} for number in range(3)]
            (tmp_path / "trace" / name / f"{split}.json").write_text(json.dumps(rows))
    return tmp_path / "trace"


def read(tasks: Path, *words: object) -> tuple[ContinualTask, ...]:
    options = options_of(tasks, tasks.parent / "run", *words)
    return read_continual_tasks(options.continual, options.as_run)


def test_tasks_of_a_file_have_their_own_options_and_evaluation_and_all_others_are_the_commands(tasks: Path) -> None:
    first, second, third = read(tasks, "--lr", 5e-3, "--global-batch-size", 4)
    assert tuple(task.name for task in (first, second, third)) == NAMES
    assert first.config.data.train_data_path == (f"{tasks.parent}/colours.jsonl",)
    assert [task.config.optimizer.lr for task in (first, second, third)] == [5e-3, 1e-3, 5e-3]
    assert (second.config.training.train_iters, second.config.training.train_epochs) == (None, 3)
    assert {task.config.training.global_batch_size for task in (first, second, third)} == {4}
    assert [task.evaluation.metrics[0] for task in (first, second, third)] == [
        "edit_similarity",
        "accuracy",
        "edit_similarity",
    ]
    assert [task.evaluation.paths() for task in (first, third)] == [
        (tasks.parent / "colours.jsonl",),
        (tasks.parent / "animals.jsonl",),
    ]


def test_tasks_of_traces_folder_have_its_order_epochs_batch_and_rate(trace: Path) -> None:
    first, second = read(trace)
    assert [first.name, second.name] == ["C-STANCE", "FOMC"]
    assert [task.config.training.train_epochs for task in (first, second)] == [TRACE["C-STANCE"].epochs, 3]
    assert [task.config.training.global_batch_size for task in (first, second)] == [256, 256]
    assert [task.config.optimizer.lr for task in (first, second)] == [1e-5, 1e-5]
    assert first.config.data.train_data_path == (str(trace / "C-STANCE"),)
    assert first.evaluation.paths() == (trace / "C-STANCE" / "test.json",)


@pytest.mark.parametrize(
    ("words", "length", "batch", "rate"),
    [
        (("--train-epochs", 2), (None, 2), 256, 1e-5),
        (("--train-iters", 7), (7, None), 256, 1e-5),
        (("--global-batch-size", 8, "--lr", 3e-4), (None, 5), 8, 3e-4),
    ],
)
def test_an_option_takes_the_place_of_traces(
    trace: Path, words: tuple[object, ...], length: tuple[int | None, int | None], batch: int, rate: float
) -> None:
    config = read(trace, *words)[0].config
    assert (config.training.train_iters, config.training.train_epochs) == length
    assert (config.training.global_batch_size, config.optimizer.lr) == (batch, rate)


def test_an_order_chooses_and_sorts_tasks(tasks: Path, trace: Path) -> None:
    assert [task.name for task in read(tasks, "--continual-order", "animals", "colours")] == ["animals", "colours"]
    assert [task.name for task in read(trace, "--continual-order", "FOMC", "C-STANCE")] == ["FOMC", "C-STANCE"]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (SEQUENCE, "", "the file must hold a list of tasks, each `- name: ...`, its options and `evaluate`."),
        ("name: colours", "lr: 1", "tasks.yaml:2: a task must begin with `name:`"),
        ("name: animals", "name: colours", "tasks.yaml:12: there is already a task colours; rename one."),
        ("name: animals", "name: zoo/animals", "the task zoo/animals names its folder, which cannot have a /"),
        ("  train_iters: 4\n  evaluate", "  trein_iters: 4\n  evaluate", "tasks.yaml:4: trein_iters"),
        ("  train_iters: 4\n  ev", "  load_hf: other\n  ev", "the task colours cannot have its own model, layout"),
        ("  lr: 1e-3", "  tensor_model_parallel_size: 2", "the task numbers cannot have its own model, layout or"),
        ("  lr: 1e-3", "  save: elsewhere", "the task numbers cannot have its own model, layout or"),
        ("  lr: 1e-3", "  lora_rank: 4", "the task numbers cannot have its own adapters, only its own lora_dropout"),
        ("  train_iters: 4\n  evaluate", "  train_iters: 0\n  evaluate", "has `train_iters: 0`, so nothing is"),
        ("evaluate: {kind: choose", "lr_min: {kind: choose", "the task numbers has no `evaluate`, the task that"),
        ("metrics: edit_similarity", "metrics: accuracy", "tasks.yaml:16: the metric accuracy is of the kind choose"),
        ("metrics: edit_similarity", "metrics: bleuu", "the metric bleuu is not known; the nearest is bleu."),
        ("choices: options, ", "", "the task numbers has no `choices`, which choose needs; add it."),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(tasks: Path, old: str, new: str, sentence: str) -> None:
    text = tasks.read_text()
    old = text if old == SEQUENCE else old
    assert old in text
    tasks.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        read(tasks)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_without_data_a_missing_split_and_an_unknown_name_are_refused(tasks: Path, trace: Path) -> None:
    with pytest.raises(UserError, match=r"--continual-order zoo: .* has colours, numbers, animals; use these"):
        read(tasks, "--continual-order", "zoo")
    tasks.write_text("- {name: a, train_iters: 1, evaluate: {kind: text, files: texts.jsonl}}\n")
    with pytest.raises(UserError, match=r"tasks.yaml:1: the task a has no `train_data_path`; name its data"):
        read(tasks)
    (trace / "FOMC" / "eval.json").unlink()
    with pytest.raises(UserError, match=r"the task FOMC has no eval.json; add it, or move the folder FOMC away"):
        read(trace)
    with pytest.raises(UserError, match=r"--continual-tasks nowhere.yaml cannot be read"):
        read(Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--replay-phase after", "--replay-phase after needs --replay-ratio or --replay-data-path; add one"),
        ("--replay-ratio 0.1 --continual-setting joint", "--replay-ratio 0.1 replays earlier tasks"),
        ("--replay-data-path lima --continual-setting single", "--replay-data-path replays earlier tasks"),
        ("--continual-average 0.5 --continual-setting single", "averages with the model before a task"),
        ("--continual-discard --save-trained-only", "with --save-trained-only later checkpoints need them"),
        ("--continual-discard --continual-setting joint", "deletes checkpoints of earlier tasks"),
        (
            "--continual-average 0.5 --hft-round-interval 2",
            "would change weights that are frozen in a task's last round",
        ),
        ("--continual-order a b a", "--continual-order names a twice, but a task is learned once"),
        (
            "--train-data-path a.jsonl",
            "--train-data-path a.jsonl would not be read: every task of --continual-tasks has its own",
        ),
        ("--continual-schedule continue --continual-setting joint", "needs tasks that follow one another"),
        ("--continual-schedule continue --hft-lr-schedule round", "has one schedule for all rounds"),
        (
            "--continual-schedule continue --lr-schedule-iters 9",
            "are set by --continual-schedule continue; leave them out",
        ),
        ("--hft-first-round 1", "--hft-first-round 1: a sequence of tasks numbers its own rounds; leave it out"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tasks: Path, words: str, sentence: str) -> None:
    options = options_of(tasks, tasks.parent / "run", "--load-hf", "model", *words.split())
    with pytest.raises(UserError) as caught:
        sequence_fits_the_run(options.continual, options.as_run)
    assert sentence in str(caught.value)


def test_what_is_missing_on_the_command_line_is_named(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        ([], "--continual-tasks is missing: name TRACE's folder, or a YAML list of tasks."),
        (["--continual-tasks", tasks], "--save is missing"),
        (
            ["--continual-tasks", tasks, "--save", "run", "--replay-data-path", "lima.jsonl"],
            "--replay-data-path lima.jsonl: there is no such file.",
        ),
        (
            ["--continual-tasks", tasks, "--save", "run", "--stages", "s.yaml"],
            "--stages cannot be used with a sequence of tasks",
        ),
        (["--continual-tasks", tasks, "--save", "run", "--continual-average", "1"], "--continual-average 1"),
    ):
        assert main(["continual", *map(str, words)]) == EXIT_USAGE
        assert sentence in capsys.readouterr().err
