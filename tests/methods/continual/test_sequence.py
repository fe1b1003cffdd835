"""The stages that a sequence of tasks is made of. Run: pytest tests/methods/continual/test_sequence.py"""

from pathlib import Path

import pytest

from hft_megatron.checkpoint.folders import checkpoint_at, complete_checkpoints, identity_of
from hft_megatron.checkpoint.position import TrainState
from hft_megatron.config.lora import LoraConfig, adapters_of
from hft_megatron.errors import UserError
from hft_megatron.methods.continual.run import discard
from hft_megatron.methods.continual.sequence import Part, parts_of
from hft_megatron.methods.continual.tasks import read_continual_tasks
from tests.checkpoint.test_folders import make_checkpoint
from tests.config.test_lora import adapter
from tests.support.sequences import NAMES, options_of, write_sequence


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_sequence(tmp_path)


def parts(tasks: Path, *words: object) -> tuple[Part, ...]:
    save = tasks.parent / "run"
    options = options_of(tasks, save, "--load", save, "--save-hf", "out", *words)
    return parts_of(read_continual_tasks(options.continual, options.as_run), options.as_run, options.continual)


def names(found: tuple[Part, ...]) -> list[str]:
    return [part.stage.folder.name for part in found]


def loads(found: tuple[Part, ...]) -> list[str]:
    """Which folder each stage reads, and with + whether it only takes its weights."""
    options = [part.stage.config.checkpoint for part in found]
    return [f"{'+' if one.finetune else ''}{Path(str(one.load)).name}" for one in options]


def data(part: Part) -> list[str]:
    return [Path(path).name for path in part.stage.config.data.train_data_path]


FOLDERS = ["task_0_colours", "task_1_numbers", "task_2_animals"]


def test_in_sequence_each_task_takes_the_weights_of_the_one_before_and_the_last_exports(tasks: Path) -> None:
    found = parts(tasks)
    assert names(found) == FOLDERS
    assert loads(found) == [FOLDERS[0], f"+{FOLDERS[0]}", f"+{FOLDERS[1]}"]
    assert [data(part) for part in found] == [[f"{name}.jsonl"] for name in NAMES]
    assert [part.after for part in found] == [1, 2, 3]
    assert all(part.ends_task and not part.stage.shares_rounds for part in found)
    assert [part.stage.config.checkpoint.save_hf for part in found] == [None, None, "out"]
    assert [part.stage.config.optimizer.lr for part in found] == [1e-5, 1e-3, 1e-5]


def test_only_what_starts_from_the_first_weights_reads_the_adapter(tasks: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    for setting, expected in (("sequential", [folder, None, None]), ("single", [folder] * 3)):
        found = parts(tasks, "--lora-adapter", folder, "--continual-setting", setting)
        assert [part.stage.config.lora.lora_adapter for part in found] == expected
        assert {adapters_of(part.stage.config.lora) for part in found} == {adapters_of(LoraConfig(lora_adapter=folder))}


def test_joint_training_is_one_stage_on_all_data_behind_which_all_tasks_are_learned(tasks: Path) -> None:
    with pytest.raises(UserError, match=r"joint trains .* but the task colours has (train|lr)"):
        parts(tasks, "--continual-setting", "joint")
    lines = tasks.read_text().splitlines(keepends=True)
    tasks.write_text(
        "".join(line for line in lines if not line.startswith(("  train_iters", "  train_epochs", "  lr")))
    )
    [joint] = parts(tasks, "--continual-setting", "joint")
    assert joint.stage.folder.name == "joint"
    assert data(joint) == [f"{name}.jsonl" for name in NAMES]
    assert (joint.after, joint.ends_task, joint.stage.config.checkpoint.save_hf) == (3, True, "out")


def test_a_model_for_each_task_starts_from_the_first_weights(tasks: Path) -> None:
    found = parts(tasks, "--continual-setting", "single")
    assert names(found) == FOLDERS
    assert loads(found) == FOLDERS


def test_replayed_data_is_mixed_into_the_data_of_every_task_but_the_first(tasks: Path) -> None:
    found = parts(tasks, "--replay-ratio", 0.5)
    assert names(found) == FOLDERS
    assert [data(part)[1:] for part in found] == [
        [],
        ["task_1_numbers.colours.jsonl"],
        ["task_2_animals.colours.jsonl", "task_2_animals.numbers.jsonl"],
    ]
    assert [[task.name for _, task in part.replays] for part in found] == [[], ["colours"], ["colours", "numbers"]]
    tasks.write_text(tasks.read_text().replace("  lr: 1e-3", "  data_keys: question=prompt"))
    with pytest.raises(UserError, match=r"--replay-ratio 0.5 .* colours has data_keys None and numbers has question=p"):
        parts(tasks, "--replay-ratio", 0.5)
    extra = parts(tasks, "--replay-data-path", "lima.jsonl")
    assert [data(part)[1:] for part in extra] == [["lima.jsonl"]] * 3
    assert not any(part.replays for part in extra)


def test_a_phase_of_replay_follows_the_task_in_its_rounds_for_one_epoch(tasks: Path) -> None:
    found = parts(tasks, "--replay-ratio", 0.5, "--replay-phase", "after", "--train-samples", 12)
    assert names(found) == [*FOLDERS[:2], "task_1_numbers_replay", FOLDERS[2], "task_2_animals_replay"]
    assert loads(found) == [FOLDERS[0], *(f"+{name}" for name in names(found)[:-1])]
    assert [part.after for part in found] == [1, 2, 2, 3, 3]
    assert [part.ends_task for part in found] == [True, False, True, False, True]
    assert [part.stage.shares_rounds for part in found] == [False, False, True, False, True]
    assert data(found[1]) == ["numbers.jsonl"]
    assert data(found[4]) == ["task_2_animals.colours.jsonl", "task_2_animals.numbers.jsonl"]
    length = found[4].stage.config.training
    assert (length.train_epochs, length.train_iters, length.train_samples) == (1, None, None)
    assert [part.stage.config.checkpoint.save_hf for part in found] == [None, None, None, None, "out"]


def test_with_other_data_alone_the_first_task_has_a_phase_too(tasks: Path) -> None:
    found = parts(tasks, "--replay-data-path", "lima.jsonl", "--replay-phase", "after")
    assert names(found)[:2] == [FOLDERS[0], f"{FOLDERS[0]}_replay"]
    assert data(found[1]) == ["lima.jsonl"]


def test_what_a_kept_delta_is_based_on_is_not_discarded(tmp_path: Path) -> None:
    """The option of deltas may have been given first, and left out when the other one was given."""
    folders = [tmp_path / name for name in FOLDERS]
    saved = []
    for folder in folders:
        folder.mkdir()
        saved.append(make_checkpoint(folder, 4))
        (saved[-1] / "plan.json").write_text("plan")
        (folder / "fisher").mkdir()
    before, digest = f"../{FOLDERS[1]}", identity_of(saved[1])
    TrainState(iteration=4, base_iteration=4, base_folder=before, base_digest=digest).write(saved[2])
    lines = discard(folders[:2], folders[:1], folders[2])
    assert lines[0] == f"> --continual-discard: deleted 1 checkpoints of {folders[0]}, a task that is done"
    assert lines[1].endswith(f"are based on {folders[1]}, which is kept")
    assert [len(complete_checkpoints(str(folder))) for folder in folders] == [0, 1, 1]
    TrainState(iteration=4).write(saved[2])
    discard(folders[:2], folders[:1], folders[2])
    assert [len(complete_checkpoints(str(folder))) for folder in folders] == [0, 0, 1]
    assert [(folder / "fisher").exists() for folder in folders] == [False, True, True]
    with pytest.raises(
        UserError, match=f"--model {folders[0]} holds a finished task .* give the folder of a later task"
    ):
        checkpoint_at(str(folders[0]), None, option="--model")
