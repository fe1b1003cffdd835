"""One rank of one trainer of ``peers.py``: takes a step on request, and reports its cost.

Run by ``peers.py``, with its job as JSON in the first argument and a socket to it in the second.
"""

import json
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Figures = dict[str, Any]


class Link:
    """The socket to the program that compares: a line of JSON each way."""

    def __init__(self, descriptor: int) -> None:
        self._lines = socket.socket(fileno=descriptor).makefile("rw", encoding="utf-8")

    def say(self, figures: Figures) -> None:
        """Sends a line."""
        self._lines.write(json.dumps(figures) + "\n")
        self._lines.flush()

    def wait(self) -> None:
        """Returns when a step is requested; ends the process when there are no more."""
        if self._lines.readline().strip() != "step":
            os._exit(0)


def measured(step: Callable[[], Figures]) -> Figures:
    """Figures of a step: its own, its wall and processor time (ms), and its page faults."""
    synchronize()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    processor, begun = time.process_time(), time.perf_counter()
    figures = step()
    synchronize()
    return {
        "step (ms)": (time.perf_counter() - begun) * 1e3,
        "processor (ms)": (time.process_time() - processor) * 1e3,
        "page faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,
        "peak resident (MB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        **figures,
    }


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train_ours(job: Job, link: Link) -> None:
    """The product itself, of whichever commit is imported, stopped before every step."""
    import torch

    from hft_megatron.cli import main

    try:
        loop: Any = import_module("hft_megatron.trainer.loop")
    except ImportError:  # at the earlier commit
        loop = import_module("hft_megatron.training.loop")

    torch.set_num_threads(1)
    take_step = loop.train_step

    def paced(run: Any) -> Any:
        if job["writes batches"] and run.state.iteration == 0:
            write_batches(run, job)
        if run.state.iteration == 0:
            link.say({"ready": True})
        link.wait()
        results: list[Any] = []

        def step() -> Figures:
            results.append(take_step(run))
            times = results[0].times
            sections = getattr(times, "sections", None) or {}
            return {"loss": results[0].loss, "phases (ms)": dict(sections)}

        link.say(measured(step))
        return results[0]

    loop.train_step = paced
    sys.exit(main(job["words"]))


def write_batches(run: Any, job: Job) -> None:
    """Writes this rank's batches of every step and, on rank 0, the units that train: for the other trainers."""
    from safetensors.torch import save_file

    folder, batch_size = Path(job["folder"]), run.config.training.global_batch_size
    for number in range(job["steps"]):
        batch = run.batches.step(number * batch_size)
        tensors = {
            f"{name}.{index}": tensor.contiguous()
            for index, one in enumerate(batch.micro_batches)
            for name, tensor in one.items()
        }
        save_file(tensors, folder / f"batch_{number}_{job['rank']}.safetensors")
    if job["rank"] == 0:
        (folder / "trains.json").write_text(json.dumps(sorted(run.wrapped.plan.training)), encoding="utf-8")


def read_batches(job: Job) -> list[list[dict[str, Any]]]:
    """The micro-batches of every step."""
    from safetensors.torch import load_file

    found = []
    for number in range(job["steps"]):
        tensors = load_file(Path(job["folder"]) / f"batch_{number}_{job['rank']}.safetensors", device=job["device"])
        count = 1 + max(int(name.rsplit(".", 1)[1]) for name in tensors)
        names = {name.rsplit(".", 1)[0] for name in tensors}
        found.append([{name: tensors[f"{name}.{index}"] for name in names} for index in range(count)])
    return found


def train_another(job: Job, link: Link) -> None:
    """A trainer of ``peer_trainers``, on the batches that ours wrote."""
    import torch
    from peer_trainers import TRAINERS

    torch.set_num_threads(1)
    trainer = TRAINERS[job["trainer"]](job)
    batches = read_batches(job)
    link.say({"ready": True})
    for batch in batches:
        link.wait()
        link.say(measured(partial(trainer.step, batch)))
    link.wait()


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    (train_ours if job["trainer"] == "ours" else train_another)(job, Link(int(sys.argv[2])))
