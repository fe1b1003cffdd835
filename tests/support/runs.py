"""Whole runs of a command that trains: inside a rank pool (fast, inspectable), and as real processes under torchrun."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from hft_megatron.config.names import MethodName
from tests.support.forked import REPOSITORY, Started, clean_environment, start, torchrun
from tests.support.models import make_llama
from tests.support.tokenizers import make_byte_level

VOCAB_SIZE = 335
"""Larger by one than the tokenizer's, and odd: TP 2 pads it."""

State = dict[str, str]
"""sha256 of every tensor that a step changes, and every step count, by name."""


def make_inputs(folder: Path, variant: str = "gqa", dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """``folder/model`` (weights and tokenizer) and ``folder/data.jsonl``: 24 examples of different lengths."""
    make_llama(folder / "model", variant, dtype, **{"vocab_size": VOCAB_SIZE} | overrides)
    make_byte_level(folder / "model")
    write_data(folder / "data.jsonl", 24)
    return folder


def write_data(path: Path, count: int) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"Say {i}{'!' * (i % 7)}"}, {"role": "assistant", "content": word}]}
        for i, word in enumerate(f"{3 * i} {'bridge ' * (1 + i % 5)}" for i in range(count))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_for(inputs: Path, *options: object) -> list[str]:
    """The words of a short run on ``make_inputs``; later options override."""
    base = ["--load-hf", inputs / "model", "--train-data-path", inputs / "data.jsonl", "--seq-length", 96]
    base += ["--train-iters", 6, "--global-batch-size", 4, "--lr", 5e-3, "--lr-warmup-iters", 2, "--weight-decay", 0.1]
    return [str(word) for word in (*base, "--no-bf16", *options)]


@dataclass
class Recorder:
    """A hook that records every step, and can do something after one of them."""

    kill_at: int | None
    """After this iteration the rank sends itself SIGTERM, as a scheduler would."""
    kill_rank: int
    steps: list[dict[str, Any]] = field(default_factory=list)
    run: Any = None

    def after_step(self, run: Any, result: Any) -> None:
        self.run = run
        self.steps.append(
            {
                "iteration": run.state.iteration,
                "consumed": run.state.consumed_samples,
                "loss": result.loss,
                "measured": dict(result.measured),
                "grad_norm": result.grad_norm,
                "lr": run.learning_rate.last,
            }
        )
        if run.state.iteration == self.kill_at and run.placement.rank == self.kill_rank:
            os.kill(os.getpid(), signal.SIGTERM)

    def after_iteration(self, run: Any) -> None:
        self.run = run

    def at_round_start(self, run: Any) -> None:
        self.run = run

    def at_round_end(self, run: Any) -> None:
        self.run = run

    def at_end(self, run: Any) -> None:
        self.run = run


def run_sft_words(words: Sequence[str], kill_at: int | None = None, kill_rank: int = 0) -> dict[str, Any]:
    """``run_method_words`` of ``hft-megatron sft``."""
    return run_method_words("sft", words, kill_at, kill_rank)


def run_method_words(
    method: MethodName, words: Sequence[str], kill_at: int | None = None, kill_rank: int = 0
) -> dict[str, Any]:
    """``run_recorded`` with a recorder that can end the run as a scheduler would."""
    return run_recorded(method, words, Recorder(kill_at=kill_at, kill_rank=kill_rank))


def run_recorded(method: MethodName, words: Sequence[str], recorder: Recorder, **groups: Any) -> dict[str, Any]:
    """Runs ``hft-megatron METHOD WORDS`` on this rank of a pool; every rank must call it. ``groups`` are options
    that the command lacks.

    Returns ``steps`` (one entry per step done here), ``state`` at the end, ``stopped`` (the signal's sentence or None)
    and ``said`` (lines announced here).
    """
    from hft_megatron.cli.entry import commands
    from hft_megatron.config.loading import load_options
    from hft_megatron.config.validation import shape_of, validate
    from hft_megatron.errors import Stopped
    from hft_megatron.methods.registry import METHODS
    from hft_megatron.trainer import assembly

    config = replace(load_options(commands()[method].options, list(words)).as_run, **groups)
    shape = shape_of(config.model)
    world_size = int(os.environ["WORLD_SIZE"])
    if shape is not None:
        validate(config, shape, world_size, method)
    stopped = None
    with _inside_a_pool(recorder) as said:
        try:
            assembly.run_training(METHODS[method], config, shape, world_size, on_loss=print)
        except Stopped as stop:
            stopped = str(stop)
        state = {} if recorder.run is None else state_of(recorder.run)
    return {"steps": recorder.steps, "state": state, "stopped": stopped, "said": said}


@contextlib.contextmanager
def _inside_a_pool(recorder: Recorder) -> Iterator[list[str]]:
    """Suppresses actions that would harm a rank that lives on: ending the process group, keeping signals."""
    from hft_megatron.trainer import assembly, prepare, saving

    said: list[str] = []
    original_hooks, original_announcer = assembly.build_hooks, prepare._announcer

    def build_hooks(run: Any, **options: Any) -> list[Any]:
        return [recorder, *original_hooks(run, **options)]

    def announcer(placement: Any) -> Any:
        announce = original_announcer(placement)

        def note(line: str) -> None:
            said.append(line)
            announce(line)

        return note

    with (
        patch.object(assembly, "stop_groups", lambda: None),
        patch.object(assembly, "build_hooks", build_hooks),
        patch.object(prepare, "_announcer", announcer),
        # The pool's own handler of SIGUSR1 shows where a rank is stuck.
        patch.object(saving.Signals, "NUMBERS", (signal.SIGTERM,)),
    ):
        yield said


def state_of(run: Any) -> State:
    """All bits of this rank that decide the next step: weights, masters, moments, step counts, rate."""
    from hft_megatron.model.parameters import parameter_slots

    found: State = {}
    with run.wrapped.gathered_parameters():
        for index, chunk in enumerate(run.wrapped.modules):
            for slot in parameter_slots([chunk]):
                found[f"{index}.{slot.local_name}"] = _hash(slot.parameter)
    optimizer = run.wrapped.shards
    if not optimizer.is_stub_optimizer:
        for group_index, group in enumerate(optimizer.optimizer.param_groups):
            for order, parameter in enumerate(group["params"]):
                name = f"optimizer.{group_index}.{order}"
                found[f"{name}.master"] = _hash(parameter)
                for key, value in optimizer.optimizer.state[parameter].items():
                    found[f"{name}.{key}"] = _hash(value) if value.dim() else str(float(value))
    for unit, tensors in run.wrapped.frozen.tensors.items():
        found |= {f"frozen.{unit}.{name}": _hash(tensor) for name, tensor in tensors.items()}
    found["unit steps"] = json.dumps(run.wrapped.unit_steps, sort_keys=True)
    found["learning rate"] = repr(run.learning_rate.last)
    return found


def _hash(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def start_cli(
    words: Sequence[str],
    *,
    ranks: int | None = None,
    log: Path,
    forks: bool = True,
    mounts_of: int | None = None,
    method: MethodName = "sft",
) -> "Started | subprocess.Popen[bytes]":
    """Starts ``python -m hft_megatron METHOD WORDS``, under torchrun when ``ranks`` is given; output goes to ``log``.

    A run that ``forks`` may have the file systems of the process ``mounts_of``; any other really starts.
    """
    command = [*(() if ranks is None else torchrun(ranks)), "-m", "hft_megatron", method, *words]
    if forks:
        return start(command, output=log, mounts_of=mounts_of)
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=REPOSITORY,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def run_cli(
    words: Sequence[str],
    *,
    ranks: int | None = None,
    log: Path,
    timeout: float = 300,
    forks: bool = True,
    method: MethodName = "sft",
) -> int:
    """``start_cli`` and wait; the exit code."""
    process = start_cli(words, ranks=ranks, log=log, forks=forks, method=method)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"did not end in {timeout:g} s:\n{log.read_text()[-4000:]}") from None
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def read_metrics(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def losses_in(save: Path) -> list[tuple[Any, ...]]:
    """The fields of metrics.jsonl that are equal in two equal runs, for every line."""
    keys = ("iteration", "consumed samples", "lm loss", "learning rate", "grad norm")
    return [tuple(line[key] for key in keys) for line in read_metrics(save)]
