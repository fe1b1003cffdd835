"""The contents of a plan's report: rounds, memory and traffic of every rank, and with --memory whether it fits."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.costs.memory_fit import Verdict, verdict
from hft_megatron.costs.rank_costs import CostModel, RankCosts
from hft_megatron.costs.rank_memory import MemoryModel, RankMemory, in_bytes
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan, make_plan
from hft_megatron.model.parameter_names import chunk_places
from hft_megatron.report.tables import table_lines

StageCosts = tuple[tuple[RankCosts, ...], ...]
"""Costs by pipeline stage, then by data-parallel rank; tensor-parallel ranks are equal."""


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """Plans of one model on one layout."""

    plans: tuple[Plan, ...]
    model: CostModel
    by_round: tuple[StageCosts, ...]
    full: StageCosts
    """Costs of full fine-tuning on the same layout."""
    half: StageCosts | None = None
    """Costs of half fine-tuning with the default draw, for a model with adapters; else None."""

    @property
    def shape(self) -> ModelShape:
        return self.model.shape

    @property
    def parallel(self) -> ParallelConfig:
        return self.model.parallel

    def total(self, costs: StageCosts) -> RankCosts:
        """Sum over all ranks, tensor-parallel ones included."""
        nothing = RankCosts(
            trainable_parameters=0, gradient_bytes=0, optimizer_bytes=0, reduce_scatter_bytes=0, all_gather_bytes=0
        )
        replicas = self.parallel.tensor_model_parallel_size
        return sum((rank for stage in costs for rank in stage for _ in range(replicas)), start=nothing)

    def stage_of_layers(self) -> dict[int, int]:
        """Pipeline stage by layer."""
        return {
            layer: stage
            for stage in range(self.parallel.pipeline_model_parallel_size)
            for place in chunk_places(self.shape, self.parallel, stage)
            for layer in range(place.first_layer, place.first_layer + place.layers)
        }


def make_report(plans: Sequence[Plan], model: CostModel) -> PlanReport:
    """Computes the costs of every plan and of full fine-tuning; ``plans`` must fit the model."""

    def all_stages(of: CostModel, trains: Callable[[str], bool]) -> StageCosts:
        stages = range(model.parallel.pipeline_model_parallel_size)
        return tuple(of.stage_costs(trains, stage) for stage in stages)

    base = replace(model, shape=model.shape.base)
    half = None
    if model.shape.adapters is not None:
        half = all_stages(base, make_plan(base.shape, HFTConfig(), default_seed=0).trains)
    return PlanReport(
        plans=tuple(plans),
        model=model,
        by_round=tuple(all_stages(model, plan.trains) for plan in plans),
        full=all_stages(base, lambda unit: True),
        half=half,
    )


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(G|Gi|M|Mi)B", re.IGNORECASE)
_UNITS = {"g": 10**9, "gi": 2**30, "m": 10**6, "mi": 2**20}
_ROWS = ("weights", "gradients", "optimizer", "before_activations", "activations", "logits", "total")


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Memory of a plan, for ``--memory``."""

    device_bytes: int
    model: MemoryModel
    plan: Verdict
    """Verdict on the round with the most memory."""
    full: Verdict
    bf16_here: bool
    """True if a run on this machine chooses bf16 without --bf16."""


def memory_size(text: str) -> int:
    """Bytes of ``80GB`` (decimal) or ``80GiB``; UserError for anything else, and for 0."""
    match = _SIZE.fullmatch(text.strip())
    size = round(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if size == 0:
        raise UserError(f"--memory {text}: must be a size such as 80GB (80 x 10^9 bytes) or 80GiB.")
    return size


def memory_report(model: MemoryModel, plans: Sequence[Plan], device_bytes: int, *, bf16_here: bool) -> MemoryReport:
    """Verdicts on the plans, and on full fine-tuning."""
    largest = max(plans, key=lambda plan: model.largest(plan.trains).total)
    without_adapters = replace(model, costs=replace(model.costs, shape=model.costs.shape.base))
    return MemoryReport(
        device_bytes=device_bytes,
        model=model,
        plan=verdict(model, largest.trains, device_bytes),
        full=verdict(without_adapters, lambda unit: True, device_bytes),
        bf16_here=bf16_here,
    )


def memory_text(report: MemoryReport) -> Iterator[str]:
    """The lines of the report."""
    batch, recompute = report.model.micro_batch, report.model.training.recompute_granularity or "no"
    yield (
        f"memory of the rank with the most, micro-batches of {batch.sequences} x {batch.seq_length:,} tokens, "
        f"{recompute} recomputation; CUDA itself needs about 1 GB more:"
    )
    judged = (report.plan, report.full)
    rows = [[name.replace("_", " "), *(in_bytes(_bytes_of(one.memory, name)) for one in judged)] for name in _ROWS]
    yield from table_lines([["", "the plan", "full"], *rows])
    for name, one in (("the plan", report.plan), ("full fine-tuning", report.full)):
        yield from _verdict_lines(name, one, report.device_bytes)
    given, chosen = (("bf16" if bf16 else "fp32") for bf16 in (report.model.costs.bf16, report.bf16_here))
    yield f"weights are in {given}; without --bf16 or --no-bf16 a run on this machine chooses {chosen}"


def _verdict_lines(name: str, judged: Verdict, room: int) -> Iterator[str]:
    total = judged.memory.total
    if judged.fits:
        yield f"{name} fits into {in_bytes(room)}, with {in_bytes(room - total)} to spare"
    else:
        yield f"{name} does not fit into {in_bytes(room)}: {in_bytes(total - room)} too much"
        if not judged.options:
            yield "  on this layout neither recomputation nor a smaller micro-batch makes it fit"
    for proposal in judged.options:
        yield f"  it fits with {proposal.words} ({in_bytes(proposal.total)})"
    if not judged.layouts:
        yield "  with these options it fits in no layout"
    for proposal in judged.layouts:
        yield f"  smallest layout: {proposal.words} ({in_bytes(proposal.total)})"


def memory_record(report: MemoryReport) -> dict[str, Any]:
    """The report for JSON, in bytes."""
    batch = report.model.micro_batch
    return {
        "device_bytes": report.device_bytes,
        "micro_batch_size": batch.sequences,
        "seq_length": batch.seq_length,
        "bf16_here": report.bf16_here,
        "plan": _judged(report.plan),
        "full": _judged(report.full),
    }


def _judged(judged: Verdict) -> dict[str, Any]:
    return {
        "fits": judged.fits,
        **{name: _bytes_of(judged.memory, name) for name in _ROWS},
        "options": [asdict(proposal) for proposal in judged.options],
        "smallest_layouts": [asdict(proposal) for proposal in judged.layouts],
    }


def _bytes_of(memory: RankMemory, name: str) -> int:
    size: int = getattr(memory, name)
    return size
