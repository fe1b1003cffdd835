"""Text of ``hft-megatron plan --time``: an estimated step of the plan beside one of full fine-tuning."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from hft_megatron.costs.step_time import StepTime, StepTimeModel
from hft_megatron.hft.plan import Plan
from hft_megatron.report.tables import table_lines


@dataclass(frozen=True, kw_only=True)
class TimeReport:
    """Step time of a plan, for ``--time``."""

    model: StepTimeModel
    plan: StepTime
    """Step time of the slowest round."""
    full: StepTime


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates that follow from a step time."""

    tokens_per_second: float
    """Tokens per second of all devices together."""
    model_tflops: float
    """Model FLOPs of one device, which don't depend on what trains, in 1e12 per second."""


def time_report(model: StepTimeModel, plans: Sequence[Plan]) -> TimeReport:
    """Estimates the plans, and full fine-tuning beside them."""
    slowest = max((model.of(plan.trains) for plan in plans), key=lambda step: step.total)
    return TimeReport(model=model, plan=slowest, full=model.of(lambda unit: True))


def rates_of(model: StepTimeModel, step: StepTime) -> Rates:
    """Tokens and model FLOPs per second of a step."""
    of_device = model.model_flops() / step.total / model.costs.world_size
    return Rates(tokens_per_second=model.tokens / step.total, model_tflops=of_device / 1e12)


def time_text(report: TimeReport) -> Iterator[str]:
    """The lines of the report."""
    model, judged = report.model, (report.plan, report.full)
    batch, device = model.micro_batch, model.device
    sequences = batch.sequences * model.micro_batches * model.costs.data_size
    yield (
        f"estimated time of a step of {sequences:,} x {batch.seq_length:,} tokens, by formula and not measured: "
        f"{model.micro_batches:,} micro-batch{'es' if model.micro_batches > 1 else ''} of {batch.sequences} on each "
        f"data-parallel rank, "
        f"{model.training.recompute_granularity or 'no'} recomputation"
    )
    sustained = [f"{device.tflops:,g} TFLOP/s", f"{device.memory_bandwidth:,g} GB/s of memory"]
    links = {
        f"within a node of {device.devices_per_node}": device.node_bandwidth,
        "between nodes": device.network_bandwidth,
    }
    sustained += [f"{bandwidth:,g} GB/s {where}" for where, bandwidth in links.items() if math.isfinite(bandwidth)]
    yield f"if a device sustains {', '.join(sustained)}:"
    rows = [
        [one.name.replace("_", " "), *(_milliseconds(getattr(step, one.name)) for step in judged)]
        for one in fields(StepTime)
    ]
    rates = [rates_of(model, step) for step in judged]
    rows += [
        ["step", *(_milliseconds(step.total) for step in judged)],
        ["tokens per second", *(f"{rate.tokens_per_second:,.0f}" for rate in rates)],
        ["model TFLOP/s per device", *(f"{rate.model_tflops:,.4g}" for rate in rates)],
    ]
    yield from table_lines([["part (ms)", "the plan", "full"], *rows])
    yield f"a step of the plan takes {report.plan.total / report.full.total:.2f} of the time of full fine-tuning"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"


def time_record(report: TimeReport) -> dict[str, Any]:
    """The report for JSON: milliseconds, and the inputs of the estimate."""
    model = report.model
    device = {name: value for name, value in asdict(model.device).items() if value is not None and math.isfinite(value)}
    return {
        "is_estimate": True,
        "device": device,
        "micro_batch_size": model.micro_batch.sequences,
        "micro_batches": model.micro_batches,
        "seq_length": model.micro_batch.seq_length,
        "tokens": model.tokens,
        "plan": _of_step(model, report.plan),
        "full": _of_step(model, report.full),
        "plan_over_full": report.plan.total / report.full.total,
    }


def _of_step(model: StepTimeModel, step: StepTime) -> dict[str, Any]:
    parts = {name: seconds * 1e3 for name, seconds in asdict(step).items()}
    return {"step_ms": step.total * 1e3, "parts_ms": parts, **asdict(rates_of(model, step))}
