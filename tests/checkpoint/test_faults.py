"""What a user sees when a save fails or a run is stopped: real ranks, real signals, real disks without room.

Run: pytest tests/checkpoint/test_faults.py. Every test prints the seconds from the fault to the last process's end.
"""

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from hft_megatron.checkpoint.folders import damage_in, find_checkpoints, iteration_of, read_digests
from hft_megatron.config.run_folder import CHECKPOINT_TRACKER_FILE
from hft_megatron.errors import EXIT_FAILURE, EXIT_OK, EXIT_STOPPED, EXIT_USAGE
from hft_megatron.trainer.saving import Signals
from tests.support.disks import Disk, small_disk
from tests.support.launched import START_TIMEOUT, Launched, launched
from tests.support.runs import make_inputs, read_metrics, words_for

pytestmark = pytest.mark.slow(reason="real ranks train under torchrun until something happens to them")

INTERVAL = 10
BOUND = 60.0
"""Seconds in which everything must have ended. The process group's time-out is ten minutes."""
BACKGROUND = "--async-save"
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that a save takes some time."""
    return make_inputs(tmp_path_factory.mktemp("inputs"), vocab_size=8000)


@pytest.fixture(autouse=True)
def nobody_else_ends_a_rank_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the example script: torchrun would kill hanging ranks after 30 seconds and hide them."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


def words(inputs: Path, save: Path, *options: object) -> list[str]:
    """A run that continues until something happens to it."""
    base = ("--tensor-model-parallel-size", 2, "--micro-batch-size", 2, "--train-iters", 5000, "--save", save)
    return words_for(
        inputs, *base, "--load", save, "--save-interval", INTERVAL, "--lr-decay-style", "constant", *options
    )


def unfinished(save: Path) -> list[Path]:
    return list(save.glob("*.unfinished*"))


def freeze_between_saves(run: Launched, save: Path) -> tuple[Path, Callable[[], None]]:
    """The newest checkpoint, and a call that lets both ranks continue; until then nobody writes on the disk."""
    tracker = save / CHECKPOINT_TRACKER_FILE  # The last file of a save.
    while True:
        run.wait_for(lambda: tracker.exists() and not unfinished(save))
        ranks = [run.rank(0), run.rank(1)]
        assert run.freeze(*ranks)
        newest = find_checkpoints(str(save)).newest
        assert newest is not None
        if not unfinished(save) and int(tracker.read_text()) == iteration_of(newest):
            return newest, partial(run.resume, *ranks)
        run.resume(*ranks)


def stop_inside_a_save(run: Launched, save: Path, *ranks: int) -> None:
    """Freezes ranks while a checkpoint after the first one is only half there: its index comes after all tensors."""

    def half_there() -> bool:
        # In this order: what is complete goes under another name.
        return any(not (folder / ".metadata").exists() and folder.exists() for folder in unfinished(save))

    run.wait_for(lambda: find_checkpoints(str(save)).newest)
    processes = [run.rank(number) for number in ranks]
    while True:
        run.wait_for(half_there)
        assert run.freeze(*processes)
        if half_there():
            return
        run.resume(*processes)


def freeze_writers(run: Launched, save: Path) -> None:
    """Freezes the processes that write in the background while each has a file begun and another one before it."""

    def caught() -> bool:
        writers = [writer for writer in (run.writer(0), run.writer(1)) if writer is not None]
        if len(writers) < 2:
            return False
        still = run.freeze(*writers)
        files = {path.name for folder in unfinished(save) for path in folder.glob("*.distcp")}
        if still and files == {"__0_0.distcp", "__1_0.distcp"}:
            return True
        run.resume(*writers)
        return False

    run.wait_for(lambda: find_checkpoints(str(save)).newest)
    run.wait_for(caught)


def wait_until_torchrun_has_passed_on(run: Launched, number: signal.Signals) -> None:
    run.wait_for(lambda: run.text().count(f"closing signal {number.name}") >= 2)


def ended(run: Launched, record: Record, code: int | None, rank: int | None = None) -> None:
    """Torchrun has ended in time, and ``rank`` with ``code``; None after a signal, when torchrun doesn't say.

    Without ``rank`` it is the one that ended first: torchrun then signals the others, even on their last lines.
    """
    torchrun, seconds = run.end(within=BOUND)
    print(f"ended after {seconds:.1f} s")
    record("seconds", round(seconds, 1))
    assert torchrun == 1, "torchrun's code for every failure"
    if code is not None:
        codes = run.exit_codes()
        assert code in (codes.values() if rank is None else [codes[rank]]), run.said()


def is_whole(checkpoint: Path | None) -> bool:
    """Whether every file is what was saved."""
    assert checkpoint is not None
    digests = read_digests(checkpoint)
    return len(digests) > 5 and damage_in(checkpoint, digests, list(digests)) is None


def status_of(save: Path) -> dict[str, object]:
    status: dict[str, object] = json.loads((save / "status.json").read_text())
    return status


def own_traces(run: Launched) -> list[str]:
    """Lines of tracebacks from inside the package; torchrun prints one of its own."""
    return re.findall(r'File "\S*/hft_megatron/\S+", line \d+', run.text())


def size_of(checkpoint: Path, *patterns: str) -> int:
    """Bytes that the files take on a disk of pages of 4,096."""
    return sum(-(-file.stat().st_size // 4096) * 4096 for pattern in patterns for file in checkpoint.glob(pattern))


def size_but_for_the_index(checkpoint: Path) -> int:
    """Room for all that comes before the index of the tensors, and for a quarter of that."""
    return size_of(checkpoint, "*.distcp", "common.pt", "plan.json", "train_state.json") + 16384


QUIET = ("--log-interval", "5000")
FULL = {
    "in the foreground": ([*QUIET], lambda first: size_of(first, "*") // 2),
    "in the background": ([*QUIET, BACKGROUND], lambda first: size_of(first, "*") // 2),
    "but for the index": ([*QUIET], size_but_for_the_index),
    "but for the index, in the background": ([*QUIET, BACKGROUND], size_but_for_the_index),
    "before anything": ([*QUIET], lambda first: 0),
}
"""Options, and how much room there is after the first checkpoint."""


@pytest.mark.parametrize("case", FULL)
def test_a_disk_that_fills_up_in_a_save_is_one_sentence_and_with_more_room_the_run_resumes(
    case: str, inputs: Path, disk: Disk, tmp_path: Path, record_property: Record
) -> None:
    options, room = FULL[case]
    folder = disk.mount_point / "run"
    save = disk.seen(folder)
    with launched(words(inputs, folder, *options), log=tmp_path / "log", mounts_of=disk.holder) as run:
        first, resume = freeze_between_saves(run, save)
        disk.leave_free(room(first))
        resume()
        ended(run, record_property, EXIT_FAILURE)
    kept, lost = int(first.name[5:]), int(first.name[5:]) + INTERVAL
    [sentence] = run.sentences()
    # Tensors are written by every rank, the rest by rank 0 for all.
    whose = r"rank \d: " if case.startswith("in the") else ""
    assert re.fullmatch(
        rf"hft-megatron: error: the checkpoint of iteration {lost} cannot be written to {folder}: {whose}"
        rf"\[Errno 28\] No space left on device.*; the newest complete checkpoint is {folder / first.name}\.",
        sentence,
    )
    assert not own_traces(run)
    assert not unfinished(save), "what could not be finished leaves room for the rest"
    assert is_whole(find_checkpoints(str(save)).newest)
    if case != "before anything":
        assert status_of(save) == {
            "exit_code": EXIT_FAILURE,
            "state": "failed",
            "message": sentence.removeprefix("hft-megatron: "),
        }

    disk.remount("size=256m")
    more = ["--train-iters", str(kept + 2), "--log-interval", "1"]
    with launched(words(inputs, folder, *more), log=tmp_path / "log", mounts_of=disk.holder) as run:
        assert run.end(within=START_TIMEOUT)[0] == EXIT_OK, run.text()
    assert f"successfully loaded checkpoint from {folder / first.name}" in run.text()
    assert [line["iteration"] for line in read_metrics(save)][-2:] == [kept + 1, kept + 2]


def test_a_log_that_can_not_be_written_is_one_sentence_and_a_restart_without_room_is_another(
    inputs: Path, disk: Disk, tmp_path: Path, record_property: Record
) -> None:
    folder = disk.mount_point / "run"
    save = disk.seen(folder)
    command = words(inputs, folder, "--save-interval", 50)
    with launched(command, log=tmp_path / "log", mounts_of=disk.holder) as run:
        newest, resume = freeze_between_saves(run, save)
        disk.leave_free(0)
        resume()
        ended(run, record_property, EXIT_FAILURE)
    [sentence] = run.sentences()
    assert re.match(
        rf"hft-megatron: error: iteration \d+ cannot be written to {folder}/metrics.jsonl: \[Errno 28\] No space left "
        rf"on device; the newest complete checkpoint is {folder / newest.name}\.$",
        sentence,
    )
    assert not own_traces(run)
    assert is_whole(find_checkpoints(str(save)).newest)

    with launched(command, log=tmp_path / "log", mounts_of=disk.holder) as run:
        run.wait_for(run.sentences)
        ended(run, record_property, EXIT_USAGE)
    [sentence] = run.sentences()
    assert sentence.startswith(f"hft-megatron: error: {folder}/metrics.jsonl cannot be written: [Errno 28] No space")
    assert is_whole(find_checkpoints(str(save)).newest)


@pytest.mark.parametrize("options", [[], [BACKGROUND]], ids=["in the foreground", "in the background"])
def test_a_folder_that_becomes_read_only_is_one_sentence(
    options: list[str], inputs: Path, disk: Disk, tmp_path: Path, record_property: Record
) -> None:
    folder = disk.mount_point / "run"
    save = disk.seen(folder)
    with launched(words(inputs, folder, *options), log=tmp_path / "log", mounts_of=disk.holder) as run:
        _, resume = freeze_between_saves(run, save)
        disk.become_read_only(folder)
        resume()
        ended(run, record_property, EXIT_FAILURE)
    [sentence] = run.sentences()
    assert re.match(
        rf"hft-megatron: error: the checkpoint of iteration \d+ cannot be written to {folder}: \[Errno 30\] Read-only "
        rf"file system: .*; the newest complete checkpoint is {folder}/iter_\d+\.$",
        sentence,
    )
    assert not own_traces(run)
    assert is_whole(find_checkpoints(str(save)).newest)


@pytest.mark.parametrize("name", ["run", "run/below"])
def test_a_folder_that_is_read_only_from_the_start_is_one_sentence_before_a_model_is_built(
    name: str, inputs: Path, disk: Disk, tmp_path: Path
) -> None:
    disk.seen(disk.mount_point / "run").mkdir()
    disk.remount("ro")
    folder = disk.mount_point / name
    log = tmp_path / "log"
    with launched(
        words(inputs, folder, "--tensor-model-parallel-size", 1), ranks=None, log=log, mounts_of=disk.holder
    ) as run:
        code, seconds = run.end(within=START_TIMEOUT)
    print(f"ended after {seconds:.1f} s")
    assert code == EXIT_USAGE
    assert log.read_text() == (
        f"hft-megatron: error: --save {folder} cannot be written: {disk.mount_point / 'run'} is not a folder that "
        f"this user may write to; choose another folder.\n"
    )


@pytest.mark.parametrize("options", [[], [BACKGROUND]], ids=["in the foreground", "in the background"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_while_it_saves_ends_the_run_and_leaves_the_checkpoint_before(
    victim: int, options: list[str], inputs: Path, tmp_path: Path, record_property: Record
) -> None:
    save = tmp_path / "run"
    with launched(words(inputs, save, *options), log=tmp_path / "log") as run:
        stop_inside_a_save(run, save, victim)
        before = find_checkpoints(str(save)).newest
        run.rank(victim).kill()
        ended(run, record_property, -signal.SIGKILL, rank=victim)
    found = find_checkpoints(str(save))
    assert found.newest == before
    assert is_whole(found.newest)
    [left] = found.unfinished
    assert found.notes() == [f"skipping {left}: it is incomplete"]


def test_a_writer_in_the_background_that_is_killed_is_one_sentence(
    inputs: Path, tmp_path: Path, record_property: Record
) -> None:
    save = tmp_path / "run"
    with launched(words(inputs, save, BACKGROUND), log=tmp_path / "log") as run:
        freeze_writers(run, save)
        frozen, killed = run.writer(0), run.writer(1)
        assert frozen is not None
        assert killed is not None
        killed.kill()
        run.resume(frozen)
        ended(run, record_property, EXIT_FAILURE)
    [sentence] = run.sentences()
    assert re.search(
        r"the checkpoint of iteration \d+ cannot be written to .*: rank 1: the background writer process was killed; "
        r"the newest complete checkpoint is .*\.$",
        sentence,
    )
    assert not own_traces(run)
    assert is_whole(find_checkpoints(str(save)).newest)
    assert not unfinished(save)


def test_a_killed_rank_ends_the_run_even_while_its_disk_hangs(
    inputs: Path, tmp_path: Path, record_property: Record
) -> None:
    save = tmp_path / "run"
    with launched(words(inputs, save, BACKGROUND), log=tmp_path / "log") as run:
        freeze_writers(run, save)
        run.rank(1).kill()
        ended(run, record_property, -signal.SIGKILL, rank=1)


@pytest.mark.parametrize(
    ("number", "to_all", "options"),
    [(signal.SIGUSR1, False, []), (signal.SIGTERM, True, [BACKGROUND]), (signal.SIGUSR1, False, [BACKGROUND])],
)
def test_a_signal_inside_a_save_lets_it_end_saves_once_more_and_reports_3(
    number: signal.Signals, to_all: bool, options: list[str], inputs: Path, tmp_path: Path, record_property: Record
) -> None:
    """``to_all``: torchrun passes the signal on to ranks that the scheduler has signalled as well."""
    save = tmp_path / "run"
    with launched(words(inputs, save, *options), log=tmp_path / "log") as run:
        stop_inside_a_save(run, save, 0, 1)
        run.launcher.send_signal(number)
        wait_until_torchrun_has_passed_on(run, number)
        for rank in (0, 1):
            if to_all:
                run.rank(rank).send_signal(number)
            run.resume(run.rank(rank))
        ended(run, record_property, None)
    newest = find_checkpoints(str(save)).newest
    assert is_whole(newest)
    assert newest is not None
    reached = int(newest.name[5:])
    [sentence] = run.sentences()
    expected = f"{number.name} stopped the run at iteration {reached}; resume it with --load {save}"
    assert sentence == f"hft-megatron: {expected}"
    assert status_of(save) == {"exit_code": EXIT_STOPPED, "state": "stopped", "message": expected}
    assert [line["iteration"] for line in read_metrics(save)] == list(range(1, reached + 1))
    assert not unfinished(save)
    assert not own_traces(run)


def test_a_second_signal_ends_at_once(inputs: Path, tmp_path: Path, record_property: Record) -> None:
    save = tmp_path / "run"
    with launched(words(inputs, save, BACKGROUND), log=tmp_path / "log") as run:
        freeze_writers(run, save)
        run.launcher.terminate()
        wait_until_torchrun_has_passed_on(run, signal.SIGTERM)
        time.sleep(3 * Signals.ONE_SIGNAL_S)
        assert run.writer(0) is not None, "the first signal waits for the save"
        run.launcher.terminate()
        ended(run, record_property, None)
    assert is_whole(find_checkpoints(str(save)).newest)
    assert len(unfinished(save)) == 1


def test_a_run_that_lasts_as_long_as_it_may_saves_and_reports_3(
    inputs: Path, tmp_path: Path, record_property: Record
) -> None:
    save = tmp_path / "run"
    with launched(words(inputs, save, "--exit-duration-in-mins", 0.05), log=tmp_path / "log") as run:
        run.wait_for(lambda: (save / "metrics.jsonl").exists())
        ended(run, record_property, EXIT_STOPPED)
    newest = find_checkpoints(str(save)).newest
    assert is_whole(newest)
    assert newest is not None
    [sentence] = run.sentences()
    assert sentence == (
        f"hft-megatron: --exit-duration-in-mins 0.05 stopped the run at iteration {int(newest.name[5:])}; resume "
        f"it with --load {save}"
    )
    assert status_of(save)["exit_code"] == EXIT_STOPPED
