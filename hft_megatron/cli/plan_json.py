"""``hft-megatron plan --json``: the plans in numbers, and every rank of the layout with its costs."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from hft_megatron.cli.plan_memory import MemoryReport, memory_record
from hft_megatron.cli.plan_report import PlanReport, StageCosts
from hft_megatron.config.derived import layers_per_stage
from hft_megatron.hft.plan import CategoryCount, Plan


def report_json(report: PlanReport, memory: MemoryReport | None = None) -> str:
    """The report as JSON. ``digest`` is that of the first round, which a run that begins with it writes to its log;
    ``ranks`` are in the order of ranks, with bytes of one rank and step."""
    model, parallel = report.model, report.parallel
    record: dict[str, Any] = {
        "digest": report.plans[0].digest,
        "model": {"layers": report.shape.num_layers, "parameters": report.shape.parameter_count()},
        "layout": {
            "world_size": model.world_size,
            "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "data_parallel_size": model.data_size,
            "layers_per_stage": layers_per_stage(parallel, report.shape.num_layers),
            "bf16": model.bf16,
        },
        "rounds": [
            {**_round(report, plan), "ranks": list(_ranks(report, costs))}
            for plan, costs in zip(report.plans, report.by_round, strict=True)
        ],
        "full_fine_tuning": {"ranks": list(_ranks(report, report.full))},
    }
    if memory is not None:
        record["memory"] = memory_record(memory)
    return _compact(record)


def _round(report: PlanReport, plan: Plan) -> dict[str, Any]:
    stages = report.stage_of_layers()
    training: dict[int | None, list[str]] = {layer: [] for layer in (None, *stages)}
    for unit in plan.units:
        if plan.trains(unit.name):
            training[unit.layer].append(unit.name)
    return {
        "round": plan.round,
        "digest": plan.digest,
        "policy": plan.policy.to_dict(),
        "trainable_parameters": plan.trainable_parameters,
        "frozen_parameters": plan.frozen_parameters,
        "categories": [_category(count) for count in plan.counts()],
        "outside_the_layers": training[None],
        "layers": [{"layer": layer, "pp": stages[layer], "trains": training[layer]} for layer in sorted(stages)],
    }


def _category(count: CategoryCount) -> dict[str, Any]:
    return {**asdict(count), "unit_ratio": count.unit_ratio, "parameter_ratio": count.parameter_ratio}


def _ranks(report: PlanReport, costs: StageCosts) -> Iterator[dict[str, int]]:
    """Ranks count over tensor, then data, then pipeline places (megatron-core's order ``tp-cp-ep-dp-pp``)."""
    tensor_size, rank = report.parallel.tensor_model_parallel_size, 0
    for stage, replicas in enumerate(costs):
        for replica, one in enumerate(replicas):
            for tensor_rank in range(tensor_size):
                yield {"rank": rank, "tp": tensor_rank, "pp": stage, "dp": replica, **vars(one)}
                rank += 1


def _compact(value: Any, indent: str = "") -> str:
    """JSON with one line for whatever holds no object: a rank, a layer, a list of names."""
    if not _holds_objects(value):
        return json.dumps(value)
    inner = indent + "  "
    if isinstance(value, Mapping):
        items = [f"{json.dumps(key)}: {_compact(item, inner)}" for key, item in value.items()]
        opening, closing = "{", "}"
    else:
        items = [_compact(item, inner) for item in value]
        opening, closing = "[", "]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}{closing}"


def _holds_objects(value: Any) -> bool:
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(isinstance(item, Mapping) or (isinstance(item, list) and _holds_objects(item)) for item in items)
