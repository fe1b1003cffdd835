"""Speed of a run, and its bill: bytes sent and held and times of every rank, beside full fine-tuning by formula."""

import json
import resource
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from hft_megatron.config.derived import sequence_length
from hft_megatron.config.run_folder import BILL_FILE, write_atomically
from hft_megatron.conversion.save import Announce
from hft_megatron.costs.flops import FORMULA, NO_EXTRA_WORK, StepFlops, step_flops
from hft_megatron.costs.rank_costs import CostModel
from hft_megatron.parallel.consensus import gathered
from hft_megatron.parallel.step_clock import OTHER, SECTIONS
from hft_megatron.report.bill import FROZEN_STATE, bill_line, render_bill
from hft_megatron.tracking import tracker as names
from hft_megatron.trainer.loop import Hook
from hft_megatron.trainer.run import Run
from hft_megatron.trainer.step import StepResult

RECENT_STEPS = 100
"""Steps whose median time gives the time left: a slow step now and then doesn't show in it."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of all ranks together in a step, or in several."""

    tokens: int
    """Positions that examples fill, trained or not; padding is not counted."""
    model_flops: int
    actual_flops: int
    milliseconds: float

    def __add__(self, other: "Work") -> "Work":
        return Work(**{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)})


def flops_of(run: Run) -> StepFlops:
    """The counts of a step under the run's current plan, whose micro-batches have the full length."""
    config = run.config
    shape, plan = run.wrapped.modules[0].shape, run.wrapped.plan
    sequences = config.training.micro_batch_size * run.sequences_per_sample
    return step_flops(
        shape,
        config.parallel,
        config.training,
        plan.trains,
        micro_batch_tokens=sequences * sequence_length(config.training, shape),
        vocab_multiple=config.model.make_vocab_size_divisible_by,
        extra=NO_EXTRA_WORK if run.reference is None else run.reference.extra_work,
    )


def work_of(result: StepResult, flops: StepFlops) -> Work:
    """The work of a step that was taken under ``flops``."""
    return Work(
        tokens=result.tokens,
        model_flops=flops.model.of(result.tokens, result.squared_lengths),
        actual_flops=flops.actual.of(result.tokens, result.squared_lengths),
        milliseconds=result.times.total,
    )


def rates(steps: Sequence[Work], world_size: int) -> dict[str, float]:
    """Tokens per second, and model and actual TFLOP per second, of one rank, by their names in the log."""
    seconds = sum(step.milliseconds for step in steps) / 1e3
    per_rank = seconds * world_size
    return {
        names.TOKENS_PER_SECOND: sum(step.tokens for step in steps) / per_rank,
        names.THROUGHPUT: sum(step.model_flops for step in steps) / per_rank / 1e12,
        names.ACTUAL_THROUGHPUT: sum(step.actual_flops for step in steps) / per_rank / 1e12,
    }


def peak_memory() -> dict[str, float]:
    """Peak memory of this rank since it started in gigabytes (1e9), under its name in the log.

    On a device the memory of tensors, without the allocator's reserve and CUDA's own; elsewhere that of the whole
    process. Read on the host alone.
    """
    if torch.cuda.is_available():
        return {names.DEVICE_PEAK: torch.cuda.max_memory_allocated() / 1e9}
    # Linux counts in units of 1024 bytes.
    return {names.PROCESS_PEAK: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


@dataclass
class TimeLeft:
    """Estimates the time for the remaining samples, without validations and checkpoints."""

    _recent: "deque[float]" = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    """Milliseconds per sample in the newest steps, whose batches may differ in size."""

    def add(self, result: StepResult, run: Run) -> None:
        """Adds the run's newest step."""
        self._recent.append(result.times.total / run.rounds.schedule.batches.of(run.state.iteration - 1))

    def seconds(self, run: Run) -> float:
        """Seconds from the run's iteration to its last."""
        left = run.rounds.schedule.batches.samples_before(run.length) - run.state.consumed_samples
        return left * median(self._recent) / 1e3


WARM_UP_STEPS = 2
"""Steps left out of the times: moments are created in the first step, and its reductions do not overlap yet."""
STEP = "step"
SUMS = ("reduced", "gathered", "wire")
"""Bytes that the bill adds up over the steps: of the buffers that are summed and filled, and those that a rank sends to
others."""
HELD = ("gradients", "masters", "moments", FROZEN_STATE)
"""Bytes held after a step, whose peak is in the bill: of a rank over all rounds, and of all ranks in one round."""


@dataclass
class Bill(Hook):
    """Accounts for the steps of this process; at the end prints a table and writes bill.json.

    Ranks' accounts are gathered once, at the end. A run that is stopped by a signal writes none: the run that resumes
    it writes the bill of its own steps.
    """

    folder: str | None
    """The --save folder; without one the table is only printed."""
    of_a_stage: bool = False
    """Print one line instead of the table, which follows after the last stage."""
    _sent: dict[str, int] = field(default_factory=lambda: {"reduced": 0, "gathered": 0})
    _held: dict[int, dict[str, int]] = field(default_factory=dict)
    """round -> peak bytes held in it."""
    _switch_ms: list[float] = field(default_factory=list)
    _flops: StepFlops = field(init=False)
    _first: int | None = None
    """Iteration of the first step; later ones may have been skipped."""
    _work: list[Work] = field(default_factory=list)
    """Work of each warm-up step, and then of all others together."""
    _times: "dict[str, array[float]]" = field(
        default_factory=lambda: {name: array("d") for name in (STEP, *SECTIONS, OTHER)}
    )

    def at_round_start(self, run: Run) -> None:
        if run.switch_ms is not None:
            self._switch_ms.append(run.switch_ms)
        self._flops = flops_of(run)

    def after_step(self, run: Run, result: StepResult) -> None:
        shards = run.wrapped.shards
        self._first = self._first or run.state.iteration
        self._sent["reduced"] += result.reduce_scatter_bytes
        self._sent["gathered"] += result.all_gather_bytes
        held = {
            "gradients": shards.gradient_bytes,
            "masters": shards.master_bytes,
            "moments": shards.moment_bytes,
            FROZEN_STATE: run.wrapped.frozen.bytes,
        }
        before = self._held.setdefault(run.state.round, dict.fromkeys(HELD, 0))
        self._held[run.state.round] = {name: max(before[name], size) for name, size in held.items()}
        work = work_of(result, self._flops)
        if len(self._work) > WARM_UP_STEPS:
            self._work[-1] += work
        else:
            self._work.append(work)
        for name, milliseconds in {STEP: result.times.total, OTHER: result.times.other}.items():
            self._times[name].append(milliseconds)
        for name, milliseconds in result.times.sections.items():
            self._times[name].append(milliseconds)

    def at_end(self, run: Run) -> None:
        steps = len(self._times[STEP])
        if self._first is None:  # a complete run that was started again
            return
        accounts = gathered(self._account(run, steps))
        bill = _bill_of(run, accounts, first=self._first, steps=steps, timed_steps=steps - _warm_up(steps))
        timed = self._work[_warm_up(steps) :]
        bill["throughput"] = {**rates(timed, run.placement.world_size), "formula": FORMULA}
        bill["switches"] = {
            "count": len(self._switch_ms),
            "mean_ms": fmean(self._switch_ms) if self._switch_ms else None,
        }
        run.announce(bill_line(bill, self.folder) if self.of_a_stage else render_bill(bill))
        if self.folder is not None and run.placement.rank == 0:
            try:
                write_atomically(Path(self.folder) / BILL_FILE, json.dumps(bill, indent=2) + "\n")
            except OSError as error:  # no reason to lose the export, which follows
                run.announce(f"> the bill could not be written: {error}")

    def _account(self, run: Run, steps: int) -> dict[str, Any]:
        placement = run.placement
        full = _full_bytes(run, steps)
        measured = self._sent | {name: max(held[name] for held in self._held.values()) for name in HELD}
        for one in (measured, full):
            one["wire"] = wire_bytes(one["reduced"] + one["gathered"], placement.data_size)
        return {
            "rank": placement.rank,
            "tensor_rank": placement.tensor_rank,
            "pipeline_rank": placement.pipeline_rank,
            "data_rank": placement.data_rank,
            "bytes": {name: {"measured": measured[name], "full": full[name]} for name in measured},
            "held_by_round": self._held,
            "peak": peak_memory(),
            "milliseconds": {name: fmean(values[_warm_up(steps) :]) for name, values in self._times.items()},
        }


def _full_bytes(run: Run, steps: int) -> dict[str, int]:
    """Bytes that this rank would have sent in all ``steps`` and held if every unit trained, by formula."""
    config, placement = run.config, run.placement
    bf16 = config.training.bf16 is True
    model = CostModel(
        shape=run.wrapped.modules[0].shape.base,
        parallel=config.parallel,
        world_size=placement.world_size,
        bf16=bf16,
        fp32_gradients=config.training.accumulate_allreduce_grads_in_fp32,
        vocab_multiple=config.model.make_vocab_size_divisible_by,
    )
    costs = model.stage_costs(lambda unit: True, placement.pipeline_rank)[placement.data_rank]
    # One fp32 master to two fp32 moments; an fp32 weight is its own master.
    masters = costs.optimizer_bytes // 3 if bf16 else 0
    return {
        "reduced": costs.reduce_scatter_bytes * steps,
        "gathered": costs.all_gather_bytes * steps,
        "gradients": costs.gradient_bytes,
        "masters": masters,
        "moments": costs.optimizer_bytes - masters,
        FROZEN_STATE: 0,
    }


def wire_bytes(buffers: int, ranks: int) -> int:
    """Bytes that each of ``ranks`` sends of buffers that are reduce-scattered or all-gathered: all parts but one, once,
    as in NCCL's rings and ``parallel.direct_exchange``."""
    return buffers * (ranks - 1) // ranks


def _warm_up(steps: int) -> int:
    """Number of first steps that the times leave out; the last step is always timed."""
    return min(WARM_UP_STEPS, steps - 1)


def _bill_of(run: Run, accounts: list[dict[str, Any]], *, first: int, steps: int, timed_steps: int) -> dict[str, Any]:
    """Contents of bill.json; ``first`` is the iteration of the first step.

    Bytes reduced and gathered are those of all ``steps``; times are means over the timed steps, so that a step's parts
    add up to the whole.
    """
    config, placement, plan = run.config, run.placement, run.wrapped.plan
    totals = {
        name: {kind: sum(one["bytes"][name][kind] for one in accounts) for kind in ("measured", "full")}
        for name in accounts[0]["bytes"]
    }
    by_round = [one.pop("held_by_round") for one in accounts]
    for name in HELD:
        # Ranks may peak in different rounds: the peak of all together is that of one round.
        totals[name]["measured"] = max(sum(rounds[round][name] for rounds in by_round) for round in by_round[0])
    return {
        "first_iteration": first,
        "last_iteration": run.state.iteration,
        "steps": steps,
        "timed_steps": timed_steps,
        "rounds": sorted(by_round[0]),
        "last_plan_digest": plan.digest,
        "trainable_parameters": plan.trainable_parameters,
        "frozen_parameters": plan.frozen_parameters,
        "tensor_model_parallel_size": placement.tensor_size,
        "pipeline_model_parallel_size": placement.pipeline_size,
        "data_parallel_size": placement.data_size,
        "overlap_grad_reduce": config.parallel.overlap_grad_reduce,
        "overlap_param_gather": config.parallel.overlap_param_gather,
        "device": placement.device.type,
        "bf16": config.training.bf16 is True,
        "fp32_gradients": config.training.accumulate_allreduce_grads_in_fp32,
        "total_bytes": totals,
        "ranks": accounts,
    }


def announce_bill_of_stages(folders: Sequence[Path], announce: Announce) -> None:
    """Prints the bill of all stages together, from the bills in their ``folders``.

    A stage's bill covers its steps since its last start. The first line counts the stages in it: those with a readable
    bill in the layout of the last one.
    """
    bills = [bill for bill in map(_left_bill, folders) if bill is not None]
    alike = [bill for bill in bills if _layout_of(bill) == _layout_of(bills[-1])]
    if alike:
        announce(render_bill(together(alike), of=f"{len(alike)} of {len(folders)} stages"))


def _left_bill(folder: Path) -> dict[str, Any] | None:
    try:
        bill: dict[str, Any] = json.loads((folder / BILL_FILE).read_text("utf-8"))
        _layout_of(bill)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return bill


def together(bills: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One bill of successive runs in the same layout: bytes sent are summed, of bytes held the peak is taken, times and
    rates are means over all timed steps."""
    steps = [bill["timed_steps"] for bill in bills]
    times = [bill["ranks"][0]["milliseconds"][STEP] * count for bill, count in zip(bills, steps, strict=True)]

    def of_rank(number: int) -> dict[str, Any]:
        ranks: list[dict[str, Any]] = [bill["ranks"][number] for bill in bills]
        return ranks[-1] | {
            "bytes": _bytes_together([rank["bytes"] for rank in ranks]),
            "milliseconds": _means([rank["milliseconds"] for rank in ranks], steps),
        }

    switches = [bill["switches"] for bill in bills if bill["switches"]["count"]]
    count = sum(one["count"] for one in switches)
    mean_ms = sum(one["mean_ms"] * one["count"] for one in switches) / count if count else None
    formula = bills[-1]["throughput"]["formula"]
    rates = [{name: rate for name, rate in bill["throughput"].items() if name != "formula"} for bill in bills]
    return bills[-1] | {
        "steps": sum(bill["steps"] for bill in bills),
        "timed_steps": sum(steps),
        "total_bytes": _bytes_together([bill["total_bytes"] for bill in bills]),
        "ranks": [of_rank(number) for number in range(len(bills[-1]["ranks"]))],
        "throughput": {**_means(rates, times), "formula": formula},
        "switches": {"count": count, "mean_ms": mean_ms},
    }


def _layout_of(bill: dict[str, Any]) -> list[Any]:
    """Values that must be equal for ranks to be compared; bills of earlier versions have other means."""
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size")
    overlap = ("overlap_grad_reduce", "overlap_param_gather", "device", "bf16")
    layout = [*(bill[name] for name in (*sizes, *overlap)), sorted(bill["switches"])]
    # Bills of earlier versions have no gradients in bf16.
    return [*layout, bill.get("fp32_gradients", True)]


def _bytes_together(bytes: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    return {
        name: {kind: (sum if name in SUMS else max)(one[name][kind] for one in bytes) for kind in ("measured", "full")}
        # Bills of earlier versions have fewer values.
        for name in bytes[0]
        if all(name in one for one in bytes)
    }


def _means(values: Sequence[dict[str, float]], weights: Sequence[float]) -> dict[str, float]:
    total = sum(weights)
    return {
        name: sum(one[name] * weight for one, weight in zip(values, weights, strict=True)) / total for name in values[0]
    }
