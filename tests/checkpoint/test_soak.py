"""Ranks are killed at random moments, again and again, and the run that resumes each time ends like one left alone.

Run: HFT_SOAK_ROUNDS=30 pytest -s tests/checkpoint/test_soak.py; without the variable 2 rounds, and HFT_SOAK_SEED=7 for
other moments than those of seed 0. Half of the kills are inside a save, half of the rounds save in the background; of
two rounds the first does both, and test_faults.py kills ranks inside saves in the foreground.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hft_megatron.checkpoint.folders import damage_in, find_checkpoints, read_digests
from hft_megatron.errors import EXIT_OK
from tests.support.launched import Launched, launched
from tests.support.runs import losses_in, make_inputs, words_for

INTERVAL = 3
FARTHEST = 2 * INTERVAL
"""A kill comes at most this many steps after the start, give or take the few that fit between two looks."""
ROUNDS = int(os.environ.get("HFT_SOAK_ROUNDS", "2"))
SEED = int(os.environ.get("HFT_SOAK_SEED", "0"))
BOUND = 60.0
"""Seconds after a kill in which everything else must have ended. The process group's time-out is ten minutes."""


@pytest.mark.slow(reason="four runs of two ranks, two of which are the whole way")
def test_a_run_whose_ranks_are_killed_again_and_again_ends_like_one_that_was_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # torchrun must not end what hangs
    inputs = make_inputs(tmp_path)
    draw = random.Random(SEED)
    victims = draw.sample([0, 1] * ROUNDS, k=ROUNDS)
    iterations = ROUNDS * 2 * (FARTHEST + INTERVAL)
    print(f"\n{ROUNDS} rounds of seed {SEED}, {iterations} iterations")

    def words(name: str, *options: str) -> list[str]:
        run = tmp_path / name
        base = ("--train-iters", iterations, "--tensor-model-parallel-size", 2, "--micro-batch-size", 2)
        folders = ("--save", run, "--load", run, "--save-hf", f"{run}-hf", "--keep-last", 3)
        return words_for(inputs, *base, *folders, "--save-interval", INTERVAL, *options)

    save, log = tmp_path / "killed", tmp_path / "log"
    caught = {"a step": 0, "a save": 0}
    slowest = 0.0
    for round in range(ROUNDS):
        moment = ("a save", "a step")[round % 2]
        victim = victims[round]
        # All four pairs of a moment and a way to save in four rounds.
        options = [] if (round + round // 2) % 2 else ["--async-save"]
        begun, before = newest_iteration(save), unfinished(save)
        with launched(words("killed", *options), log=log) as run:
            if moment == "a save":
                after = begun + draw.randrange(3) * INTERVAL
                run.wait_for(lambda after=after: newest_iteration(save) >= after)
                freeze_inside_a_save(run, save, victim, delay=draw.uniform(0, 0.1))
            else:
                step = begun + draw.randrange(1, FARTHEST + 1)
                run.wait_for(lambda step=step: f"] iteration {step:8d}/" in run.text())
                time.sleep(draw.uniform(0, 0.1))
            run.rank(victim).kill()
            code, seconds = run.end(within=BOUND)
        assert code == 1
        assert run.exit_codes()[victim] == -signal.SIGKILL, run.said()
        loaded = f"successfully loaded checkpoint from {save / f'iter_{begun:07d}'} at iteration {begun}\n"
        assert (loaded in run.text()) == (begun > 0), run.said()
        check_folder(save, begun)
        # Rank 0 may finish a save that the other was killed in; a kill after a step may meet a save too.
        inside = "a save" if unfinished(save) - before else moment
        caught[inside] += 1
        slowest = max(slowest, seconds)
        print(
            f"round {round} {' '.join(options) or '(saves in the foreground)'}: from {begun} to "
            f"{newest_iteration(save)}, rank {victim} killed inside {inside}, "
            f"all ended after {seconds:.1f} s"
        )
    assert newest_iteration(save) < iterations, "else the last rounds killed nothing"
    assert not (tmp_path / "killed-hf").exists()
    for name in ("killed", "alone"):
        with launched(words(name), log=log) as run:
            assert run.end(within=600)[0] == EXIT_OK, run.said()
    assert len(losses_in(tmp_path / "alone")) == iterations
    assert losses_in(save) == losses_in(tmp_path / "alone")
    exported = [load_file(tmp_path / f"{name}-hf" / "model.safetensors") for name in ("killed", "alone")]
    assert exported[0].keys() == exported[1].keys()
    assert all((exported[0][name] == exported[1][name]).all() for name in exported[0])
    assert caught["a save"] >= ROUNDS // 2
    print(f"killed inside {caught}, slowest end {slowest:.1f} s: bit for bit the run that was left alone")


def newest_iteration(save: Path) -> int:
    newest = find_checkpoints(str(save)).newest
    return 0 if newest is None else int(newest.name[5:])


def unfinished(save: Path) -> set[Path]:
    return set(save.glob("iter_*.unfinished-*"))


def freeze_inside_a_save(run: Launched, save: Path, victim: int, *, delay: float) -> None:
    """Waits for a save, ``delay`` seconds more, and freezes a rank; on to the next save where this one is over then."""
    while True:
        old = unfinished(save)
        run.wait_for(lambda old=old: unfinished(save) - old)
        time.sleep(delay)
        assert run.freeze(run.rank(victim))
        if unfinished(save) - old:
            return
        run.resume(run.rank(victim))
        delay /= 2


def check_folder(save: Path, begun: int) -> None:
    """Every complete checkpoint is what was saved, and none was lost."""
    found = find_checkpoints(str(save))
    assert found.missing is None
    assert newest_iteration(save) >= begun
    for path in found.complete:
        digests = read_digests(path)
        assert len(digests) > 5
        assert damage_in(path, digests, list(digests)) is None
