"""Sequences as real processes: killed and started again, in another layout, averaged, and in several rounds.

Run: pytest tests/methods/continual/test_killed.py
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hft_megatron.checkpoint.folders import chain_of, complete_checkpoints, end_of_chain
from hft_megatron.checkpoint.saved_run import SavedRun
from hft_megatron.errors import EXIT_STOPPED
from hft_megatron.evaluation.weight_changes import folder_weights, run_weights
from tests.support.forked import kill_all
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, read_metrics, run_cli, run_sft_words, start_cli, words_for
from tests.support.sequences import IGNORED, write_sequence

pytestmark = pytest.mark.slow(reason="every sequence is three tasks on two ranks, with their evaluations")

SHARE = "trained in at least one of the tasks: "
TENSOR_2 = ("--tensor-model-parallel-size", 2)
FIRST, SECOND, THIRD = "task_0_colours", "task_1_numbers", "task_2_animals"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("sequences"), hidden_size=32, intermediate_size=56)
    write_sequence(folder)
    return folder


def words_of(inputs: Path, save: Path, *options: object) -> list[str]:
    base = ["--continual-tasks", inputs / "tasks.yaml", "--continual-general", inputs / "general.yaml"]
    base += ["--load-hf", inputs / "model", "--seq-length", 96, "--no-bf16", "--global-batch-size", 4, "--lr", 5e-3]
    base += ["--lr-decay-style", "constant", "--save", save, "--load", save, "--save-interval", 2]
    base += ["--continual-kl-to-base", "--make-vocab-size-divisible-by", 64]
    base += [
        "--hft-rotation",
        "complementary",
        "--hft-audit",
        "--log-interval",
        1,
        "--continual-batch-size",
        3,
        *IGNORED,
    ]
    return [str(word) for word in (*base, *options)]


def run(words: list[str], log: Path, *, ranks: int | None = 2) -> str:
    assert run_cli(words, ranks=ranks, log=log, method="continual") == 0, log.read_text()[-4000:]
    return log.read_text()


@pytest.fixture(scope="module")
def whole(inputs: Path) -> Path:
    """The folder of a sequence that nobody stopped; its log is beside it."""
    run(words_of(inputs, inputs / "whole", *TENSOR_2), inputs / "whole.log")
    return inputs / "whole"


def answers(save: Path) -> dict[str, bytes]:
    """The matrix and every file of predictions."""
    files = [save / "matrix.json", *sorted((save / "predictions").rglob("*.jsonl"))]
    return {str(file.relative_to(save)): file.read_bytes() for file in files}


def cells(save: Path) -> list[int]:
    """How many cells each row of the matrix has."""
    file = save / "matrix.json"
    return [len(row["cells"]) for row in json.loads(file.read_text())["rows"]] if file.exists() else []


def plans(save: Path) -> list[dict[str, Any]]:
    """Of each stage in the order of their names."""
    folders = sorted(save.glob("task_*"))
    return [json.loads((complete_checkpoints(str(folder))[0] / "plan.json").read_text()) for folder in folders]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint of a stage, by unit."""
    names = [unit["name"] for unit in plans(folder.parent)[0]["units"]]
    with run_weights(SavedRun.read(str(folder), None)) as held:
        return {name: held.read(name).clone() for name in names}


def steps_of(folder: Path) -> list[tuple[Any, ...]]:
    """What two stages that are the same have alike in every step."""
    keys = ("iteration", "lm loss", "learning rate", "grad norm", "round")
    return [tuple(line[key] for key in keys) for line in read_metrics(folder) if "grad norm" in line]


def in_training(save: Path, task: str) -> bool:
    file = save / task / "metrics.jsonl"
    return file.exists() and len(file.read_text().splitlines()) >= 3


def run_and_kill(words: list[str], log: Path, when: Callable[[], bool]) -> None:
    process = start_cli(words, ranks=2, log=log, method="continual")
    try:
        deadline = time.monotonic() + 280
        while not when():
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.005)
    finally:
        if process.poll() is None:
            kill_all(process)
            process.wait()


def killed_and_resumed(inputs: Path, save: Path, when: Callable[[], bool], *options: object) -> str:
    """A sequence that is killed with its second task, and resumed; the log of what resumed."""
    log = save.with_suffix(".log")
    words = words_of(inputs, save, *TENSOR_2, *options)
    run_and_kill(words, log, when)
    assert cells(save)[:2] == [4, 2]
    assert sum(cells(save)[2:]) < 3, "it must be caught before the row is full"
    return run(words, log)


def test_a_sequence_that_is_killed_while_a_row_is_written_ends_as_one_that_was_not(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    save = tmp_path / "run"
    killed_and_resumed(inputs, save, lambda: (cells(save)[2:] or [0])[0] >= 1)
    assert answers(save) == answers(whole)
    for folder in sorted(whole.glob("task_*")):
        assert steps_of(save / folder.name) == steps_of(folder)


def bytes_of(folder: Path) -> int:
    """Of the newest checkpoint of a stage."""
    return sum(file.stat().st_size for file in complete_checkpoints(str(folder))[0].glob("*.distcp"))


def test_a_sequence_of_deltas_that_is_killed_in_training_ends_as_one_of_whole_checkpoints_that_was_not(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    save, log = tmp_path / "run", tmp_path / "log"
    options = "--save-trained-only", "--keep-last", 1
    killed_and_resumed(inputs, save, lambda: in_training(save, SECOND), *options)
    assert answers(save) == answers(whole)
    chain = [path.relative_to(save) for path, _ in chain_of(complete_checkpoints(str(save / THIRD))[0])]
    assert [path.parts[0] for path in chain] == [THIRD, SECOND, FIRST]
    assert end_of_chain(save / chain[0]).is_based_on_model
    for folder in (FIRST, SECOND, THIRD):
        assert bytes_of(save / folder) < bytes_of(whole / folder)
        held, expected = weights(save / folder), weights(whole / folder)
        assert all(torch.equal(weight, expected[name]) for name, weight in held.items())
        assert steps_of(save / folder) == steps_of(whole / folder)
    check_divergences(inputs, whole, save / THIRD, log)


def check_divergences(inputs: Path, whole: Path, last: Path, log: Path) -> None:
    """Those of the last row are what an evaluation beside the base gives of the checkpoint."""
    output = log.with_suffix(".json")
    words = ["--model", last, "--base", inputs / "model", "--tasks", inputs / "general.yaml", "--output", output]
    assert run_cli([str(word) for word in words], log=log, method="evaluate") == 0, log.read_text()[-4000:]
    [model] = json.loads(output.read_text())["models"]
    rows = [row["cells"]["texts"]["beside"] for row in json.loads((whole / "matrix.json").read_text())["rows"]]
    [task] = model["tasks"]
    values = task["values"]
    assert values["kl_base_tuned"] > 1e-4
    assert rows[-1] == pytest.approx({name: value for name, value in values.items() if name in rows[-1]}, rel=1e-3)
    assert {"kl_base_tuned", "kl_tuned_base"} <= rows[-1].keys()
    assert "kl_base_tuned" not in rows[0]
    assert rows[1]["kl_base_tuned"] != rows[-1]["kl_base_tuned"]


def test_a_sequence_that_discards_and_is_killed_in_an_evaluation_keeps_the_last_tasks_checkpoints(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    save, log = tmp_path / "run", tmp_path / "log"
    resumed = killed_and_resumed(inputs, save, (save / SECOND / "bill.json").exists, "--continual-discard")
    logs = resumed, (inputs / "whole.log").read_text()
    assert answers(save) == answers(whole)
    shares = [line for text in logs for line in text.splitlines() if SHARE in line]
    assert shares[0] == shares[1]
    # As if a kill had come while they were deleted.
    (save / FIRST / "iter_0000004.unfinished").mkdir()
    (save / FIRST / "latest_checkpointed_iteration.txt").write_text("4\n")
    before = {path: path.stat().st_mtime_ns for path in save.rglob("*.distcp")}
    config = (save / THIRD / "resolved_config.yaml").read_bytes()
    again = run(words_of(inputs, save, "--continual-discard", "--lr", 1), log, ranks=None)
    assert "the run is complete: iteration 4 of 4, no steps left" in again
    assert "warning: iteration 4 is the last, so these options have no effect" in again
    assert (save / THIRD / "resolved_config.yaml").read_bytes() == config
    assert {path: path.stat().st_mtime_ns for path in save.rglob("*.distcp")} == before
    assert answers(save) == answers(whole)
    for number, (folder, iterations) in enumerate(((FIRST, 4), (SECOND, 12))):
        left = {path.name for path in (save / folder).iterdir()}
        assert {"metrics.jsonl", "bill.json", "run_identity.json", "resolved_config.yaml", "plan.json"} <= left
        assert not {name for name in left if name.startswith(("iter_", "latest"))}
        record = json.loads((save / folder / "finished.json").read_text())
        assert record == {"iteration": iterations, "round": number}
        assert steps_of(save / folder) == steps_of(whole / folder)
    assert bytes_of(save / THIRD) == bytes_of(whole / THIRD)
    text = (inputs / "tasks.yaml").read_text().replace("files: ", f"files: {inputs}/")
    (tmp_path / "tasks.yaml").write_text(text.replace("train_iters: 4", "train_iters: 5", 1))
    longer = words_of(inputs, save, "--continual-discard", "--continual-tasks", tmp_path / "tasks.yaml")
    assert run_cli(longer, log=log, method="continual") == 2
    assert f"{FIRST} ended at iteration 4, from which {save / SECOND} has started" in log.read_text()


def test_a_sequence_of_adapters_that_discards_and_is_done_asks_for_no_weights_that_are_gone(
    inputs: Path, tmp_path: Path
) -> None:
    save, log = tmp_path / "run", tmp_path / "log"
    options = ["--hft-rotation", "independent", "--lora-rank", 4, "--kl-to-base", 0.1, "--continual-discard"]
    words = words_of(inputs, save, *options, "--continual-order", "colours", "animals", "--continual-evaluate", "last")
    first = run(words, log, ranks=None)
    assert [line for line in first.splitlines() if line.startswith("> reference")] == [
        "> reference: the policy without its adapters",
        "> reference: the policy's frozen weights, and a copy of each unit that trains",
    ]
    assert not list((save / FIRST).glob("iter_*"))
    steps = [line for line in read_metrics(save / "task_1_animals") if "grad norm" in line]
    assert steps[0]["kl to base"] == 0.0 < steps[-1]["kl to base"]
    before = answers(save)
    again = run(words, log, ranks=None)
    assert "no steps left" in again
    assert "> reference" not in again
    assert answers(save) == before


def test_each_task_trains_its_round_and_nothing_else(inputs: Path, whole: Path) -> None:
    found = plans(whole)
    assert [plan["rounds"] for plan in found] == [[0], [1], [2]]
    trains = [{unit["name"] for unit in plan["units"] if unit["trains"]} for plan in found]
    assert not {name for name in trains[0] & trains[1] if ".layers." in name}
    stages = [weights(folder) for folder in sorted(whole.glob("task_*"))]
    for (before, after), trained in zip(((stages[0], stages[1]), (stages[1], stages[2])), trains[1:], strict=True):
        changed = {name for name, held in before.items() if not torch.equal(held, after[name])}
        assert changed == trained
    sizes = {unit["name"]: unit["parameters"] for unit in found[0]["units"]}
    share = sum(sizes[name] for name in set().union(*trains)) / sum(sizes.values())
    log = (inputs / "whole.log").read_text()
    assert log.count("no frozen shard has changed since the round began") == 3
    assert f"trained in at least one of the tasks: {share:.1%} of the weights" in log
    assert (whole / "matrix.png").stat().st_size > 0


def test_a_sequence_resumes_in_another_layout(inputs: Path, whole: Path, tmp_path: Path) -> None:
    save, log_file = tmp_path / "run", tmp_path / "log"
    stopped = words_of(inputs, save, *TENSOR_2, "--exit-interval", 6)
    assert run_cli(stopped, ranks=2, log=log_file, method="continual") == 1  # torchrun's word for any end
    assert "--exit-interval 6 stopped the run at iteration 6; run the same command again" in log_file.read_text()
    log = run(words_of(inputs, save), log_file)
    assert "TP 1 x PP 1 x DP 2" in log
    rows, expected = (json.loads((folder / "matrix.json").read_text())["rows"] for folder in (save, whole))
    for row, other in zip(rows, expected, strict=True):
        values, of_other = ({name: cell["value"] for name, cell in each["cells"].items()} for each in (row, other))
        assert values == pytest.approx(of_other, rel=1e-4)
    for step, other in zip(steps_of(save / SECOND), steps_of(whole / SECOND), strict=True):
        assert step == pytest.approx(other, rel=1e-4)


def test_each_result_is_averaged_with_the_model_before_it(inputs: Path, whole: Path, tmp_path: Path) -> None:
    share, save, stopped = 0.3, tmp_path / "run", tmp_path / "stopped"
    options = [*TENSOR_2, "--continual-order", "colours", "numbers", "--continual-evaluate", "last"]
    options += ["--continual-average", share]
    run(words_of(inputs, save, *options), tmp_path / "log")
    words = words_of(inputs, stopped, *options, "--exit-interval", 6)
    assert run_cli(words, ranks=2, log=tmp_path / "log", method="continual") == 1  # torchrun's word for any end
    assert "--exit-interval 6 stopped the run at iteration 6" in (tmp_path / "log").read_text()
    run(words_of(inputs, stopped, *options), tmp_path / "log")
    trained, averaged = weights(whole / "task_0_colours"), weights(save / "task_0_colours")
    with folder_weights(str(inputs / "model"), option="--load-hf") as held:
        for name, weight in averaged.items():
            before = held.read(name).float()
            assert torch.equal(weight, torch.lerp(before, trained[name], share)), name
            assert torch.allclose(weight, share * trained[name] + (1 - share) * before, rtol=1e-6, atol=1e-7)
    second, resumed = weights(save / SECOND), weights(stopped / SECOND)
    trains = {unit["name"] for unit in plans(save)[1]["units"] if unit["trains"]}
    assert {name for name, weight in second.items() if not torch.equal(weight, averaged[name])} == trains
    assert all(torch.equal(weight, resumed[name]) for name, weight in second.items())
    assert answers(stopped) == answers(save)


def test_several_rounds_inside_a_task_are_numbered_on_and_a_phase_of_replay_has_its_tasks(
    inputs: Path, tmp_path: Path
) -> None:
    save, log = tmp_path / "run", tmp_path / "log"
    options = ["--hft-round-interval", 2, "--replay-ratio", 0.5, "--replay-phase", "after"]
    options += ["--continual-evaluate", "last"]
    words = words_of(inputs, save, *options, "--exit-interval", 6)
    assert run_cli(words, log=log, method="continual") == EXIT_STOPPED, log.read_text()[-4000:]
    log_of_rest = run(words_of(inputs, save, *options), log, ranks=None)
    rounds = {folder.name: [step[-1] for step in steps_of(folder)] for folder in sorted(save.glob("task_*"))}
    assert rounds == {
        "task_0_colours": [0, 0, 1, 1],
        "task_1_numbers": [2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7],
        "task_1_numbers_replay": [2, 2],
        "task_2_animals": [8, 8, 9, 9],
        "task_2_animals_replay": [8, 8, 9, 9],
    }
    found = dict(zip(rounds, plans(save), strict=True))
    assert found["task_2_animals"] == found["task_2_animals_replay"]
    assert "trained in at least one of the tasks: 100.0% of the weights" in log_of_rest


SCHEDULE = ("--lr-decay-style", "cosine", "--lr-warmup-iters", 6, "--min-lr", 1e-4)


def test_one_schedule_goes_through_all_tasks_also_after_a_stop(inputs: Path, ranks: RankPools, tmp_path: Path) -> None:
    save, log, tasks = tmp_path / "run", tmp_path / "log", tmp_path / "tasks.yaml"
    tasks.write_text(
        (inputs / "tasks.yaml").read_text().replace("  lr: 1e-3\n", "").replace("files: ", f"files: {inputs}/")
    )
    options = [*SCHEDULE, "--continual-schedule", "continue", "--continual-evaluate", "last"]
    options += ["--continual-tasks", tasks, "--continual-order", "colours", "numbers"]
    words = words_of(inputs, save, *options, "--exit-interval", 5)
    assert run_cli(words, log=log, method="continual") == EXIT_STOPPED, log.read_text()[-4000:]
    assert "stopped the run at iteration 5" in log.read_text()  # of the second task: the first has 4
    said = run(words_of(inputs, save, *options), log, ranks=None)
    assert "the learning rate schedule" not in said
    rates = [step[2] for folder in sorted(save.glob("task_*")) for step in steps_of(folder)]
    one_run = words_for(inputs, *SCHEDULE, "--lr", 5e-3, "--train-iters", 16)
    [answer] = ranks(1).run(run_sft_words, words=one_run)
    assert rates == [step["lr"] for step in answer["steps"]]
    assert len(set(rates)) == 16
