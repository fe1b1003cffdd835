"""Checks 11 and 12: time and memory of round switches and checkpoints of a 1B model."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from made_inputs import make_tokenizer
from measured_speed import ONE_B, TOY
from product import Run, run
from working_site import Site, expect

ROUNDS, STEPS_PER_ROUND = 6, 3
GROWTH = 1.05
"""Limit on the growth of the memory that torch reserves, from the second round to the last."""
SWITCH = "round switch time (ms)"
SAVED = re.compile(r"([\d,.]+) MB in ([\d,]+) ms, training paused for ([\d,]+) ms")


def rounds(site: Site) -> dict[str, Any]:
    """Check 11: six rounds with carried moments; memory must not grow from one to the next."""
    from hft_megatron.trainer import loop

    switches: list[_Memory] = []
    switch = loop.begin_round
    with patch.object(loop, "begin_round", lambda *given: _noting(switches, lambda: switch(*given))):
        options = ("--hft-round-interval", STEPS_PER_ROUND, "--hft-moments", "carry", "--hft-frozen-moments", "host")
        found = _train(site, ROUNDS * STEPS_PER_ROUND, *options)
    milliseconds = found.values(SWITCH)
    expect(len(milliseconds) == len(switches) == ROUNDS - 1, f"{ROUNDS} rounds have {len(milliseconds)} switches")
    growth = switches[-1].reserved / switches[0].reserved if switches[0].reserved else 1.0
    expect(growth <= GROWTH, f"torch reserves {growth:.2f} of what it did after the first switch, more than {GROWTH}")
    return {
        "switch ms": median(milliseconds),
        "peak in a switch GB": max(one.peak for one in switches) / 1e9,
        "held before GB": max(one.before for one in switches) / 1e9,
        "reserved, last / first": growth,
    }


def checkpoint(site: Site) -> dict[str, Any]:
    """Check 12: saves, and loads in a run that continues for two steps."""
    from hft_megatron.checkpoint.writer import CheckpointWriter
    from hft_megatron.trainer import assembly

    folder = site.new_folder("checkpoints")
    saves: list[_Memory] = []
    loads: list[_Memory] = []
    save, load = CheckpointWriter.save, vars(assembly)["starting_state"]
    with patch.object(CheckpointWriter, "save", lambda *given, **named: _noting(saves, lambda: save(*given, **named))):
        first = _train(site, 2, save=folder)
    with patch.object(
        assembly, "starting_state", lambda *given, **named: _noting(loads, lambda: load(*given, **named))
    ):
        resumed = _train(site, 4, "--load", folder, save=folder)
    said = SAVED.search(first.said)
    expect(said is not None, f"the run does not report the time of its checkpoint: {first.said[-600:]}")
    assert said is not None
    megabytes, took, stall = (float(text.replace(",", "")) for text in said.groups())
    expect([line["iteration"] for line in resumed.metrics] == [1, 2, 3, 4], "the run did not resume from step 2")
    return {
        "GB": megabytes / 1e3,
        "save GB/s": megabytes / max(took, 1.0),
        "stall ms": stall,
        "load GB/s": megabytes / 1e3 / loads[0].seconds,
        "save: host peak GB": saves[0].host_peak / 1e9,
        "save: GPU transient GB": (saves[0].peak - saves[0].before) / 1e9,
        "load: host peak GB": loads[0].host_peak / 1e9,
        "load: GPU transient GB": (loads[0].peak - loads[0].before) / 1e9,
    }


class _Memory:
    """Bytes before, at most within, and reserved after a part of a run; on CPU those of the device are 0."""

    def __init__(self) -> None:
        self.before = self.peak = self.reserved = self.host_peak = 0
        self.seconds = 0.0


def _noting(notes: list[_Memory], work: Callable[[], Any]) -> Any:
    import torch

    on_card, note = torch.cuda.is_available(), _Memory()
    # 5 resets the peak of the process's resident memory to its current value.
    Path("/proc/self/clear_refs").write_text("5")
    host_before = _resident_peak()
    if on_card:
        torch.cuda.synchronize()
        note.before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = work()
    if on_card:
        torch.cuda.synchronize()
        note.peak, note.reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
    note.seconds, note.host_peak = time.perf_counter() - began, _resident_peak() - host_before
    notes.append(note)
    return result


def _resident_peak() -> int:
    """Bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def _train(site: Site, steps: int, *options: object, save: Path | None = None) -> Run:
    shape, length = (TOY, 64) if site.toy else (ONE_B, 2048)
    words = ("--mock-data", "--tokenizer-model", make_tokenizer(site.folder / "bytes"), *shape.words(length))
    constant = ("--lr", 1e-5, "--lr-decay-style", "constant", "--no-bf16" if site.toy else "--bf16")
    return run(site, "pretrain", *words, *constant, "--train-iters", steps, *options, save=save)
