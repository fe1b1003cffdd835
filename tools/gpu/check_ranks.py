"""The correctness part on several GPUs: every layout has one CPU's losses, and a killed run resumes."""

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import patch

import psutil
from check_losses import FULL_RECOMPUTE, OVERLAP, RECIPE, STEPS, compare, inputs, learn
from product import run, started, wait_for_steps
from working_site import Site, expect

TP = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
PP = ("--pipeline-model-parallel-size", 2)
SPLIT = ("--micro-batch-size", 1)
"""At least two micro-batches for a pipeline, and a batch that two data-parallel ranks share."""
HALFWAY = STEPS // 2
BEFORE_KILL = 3
END_S = 60.0
"""Time-out for the remaining ranks to end, and to report the reason."""


def tensor_parallel(site: Site) -> dict[str, Any]:
    """TP 2 with sequence parallelism, packed too."""
    return _learn(site, {"plain": ("plain", TP), "packed": ("packed", TP)})


def pipeline_parallel(site: Site) -> dict[str, Any]:
    """PP 2, one model chunk per rank and interleaved, with recompute."""
    interleaved = (*PP, "--num-layers-per-virtual-pipeline-stage", 1)
    ways = {"plain": ("plain", (*PP, *SPLIT)), "packed": ("packed", PP)}
    return _learn(site, ways | {"interleaved, recompute": ("plain", (*interleaved, *SPLIT, *FULL_RECOMPUTE))})


def data_parallel(site: Site) -> dict[str, Any]:
    """DP over all ranks."""
    return _learn(site, {"plain": ("plain", SPLIT), "packed": ("packed", ())})


def both(site: Site) -> dict[str, Any]:
    """TP 2 x PP 2, and DP 2 of TP 2 beside it."""
    return _learn(
        site, {"TP 2 x PP 2": ("plain", (*TP, *PP, *SPLIT)), "TP 2 x DP 2": ("plain", (*TP, *SPLIT, *OVERLAP))}
    )


def overlap(site: Site) -> dict[str, Any]:
    """Overlapped reduction and gathers in small buckets, within a round and over rounds."""
    options = (*OVERLAP, *SPLIT)
    series = ("plain", "rounds, reset", "rounds, carried")
    return _learn(site, {name: (name, options) for name in series})


def _learn(site: Site, ways: Mapping[str, tuple[str, Sequence[object]]]) -> dict[str, Any]:
    return {name: compare(site, learn(site, series, *options), series) for name, (series, options) in ways.items()}


def resume_elsewhere(site: Site) -> dict[str, Any]:
    """Saves in the background at DP, resumes at TP 2, and still has one CPU's losses."""
    model, data = inputs(site)
    words = ("--load-hf", model, "--train-data-path", data, *RECIPE, *SPLIT, "--no-bf16")
    folder = site.new_folder("async")
    with _stopping_at(HALFWAY):
        run(site, "sft", *words, "--async-save", "--save-interval", HALFWAY // 2, save=folder, exit_code=3)
    resumed = run(site, "sft", *words, *TP, "--load", folder, save=folder)
    expect(f"iteration {HALFWAY}" in resumed.said or site.rank != 0, f"did not resume from {HALFWAY}: {resumed.said}")
    return {"resumed at TP 2": compare(site, resumed, "plain")}


def _stopping_at(step: int) -> Any:
    """Sends a run SIGTERM within the context, as a scheduler would, in its step with this number."""
    from hft_megatron.trainer import loop

    take_step = vars(loop)["train_step"]

    def and_stop(of_run: Any) -> Any:
        if of_run.state.iteration == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(of_run)

    return patch.object(loop, "train_step", and_stop)


def killed(site: Site) -> dict[str, Any]:
    """Kills one rank of a started run: the others end, and the same command resumes from the newest checkpoint."""
    model, data = inputs(site)
    folder = site.new_folder("killed")
    constant = ("--deterministic-mode", "--lr-decay-style", "constant", "--lr-warmup-iters", 0)
    words = ("--load-hf", model, "--train-data-path", data, *RECIPE, *SPLIT, "--no-bf16", *constant)
    stopped: dict[str, Any] = {}
    if site.rank == 0:
        stopped = _kill_a_rank(site, words, folder)
    site.meet()
    last = 2 + max(int(path.name.removeprefix("iter_")) for path in folder.glob("iter_*"))
    resumed = run(site, "sft", *words, "--train-iters", last, "--load", folder, save=folder)
    whole = run(site, "sft", *words, "--train-iters", last)
    expect(
        resumed.bits == whole.bits,
        f"the resumed run has other losses: {json.dumps(resumed.bits)} and {json.dumps(whole.bits)}",
    )
    return stopped


def _kill_a_rank(site: Site, words: Sequence[object], folder: Any) -> dict[str, Any]:
    log = site.folder / "killed.log"
    begin = ("sft", *words, "--train-iters", 100_000, "--save", folder, "--save-interval", 2)
    with started(begin, log, ranks=site.ranks) as process:
        wait_for_steps(process, folder, BEFORE_KILL, log)
        ranks = [child for child in psutil.Process(process.pid).children() if "hft_megatron" in child.cmdline()]
        expect(len(ranks) == site.ranks, f"torchrun has {len(ranks)} ranks instead of {site.ranks}")
        ranks[-1].kill()
        begun = time.monotonic()
        _, alive = psutil.wait_procs(ranks, timeout=END_S)
        code = process.wait(END_S)
        took = time.monotonic() - begun
    said = log.read_text(encoding="utf-8", errors="replace")
    expect(not alive, f"{len(alive)} ranks are still alive {END_S:g} s after another was killed")
    expect(code == 1, f"torchrun's exit code is {code} instead of 1")
    expect("exitcode  : -9" in said or "SIGKILL" in said, f"torchrun does not name the killed rank: {said[-1500:]}")
    return {"ended after (s)": round(took, 1)}
