"""A plan's report as text for a terminal and as JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, replace
from typing import Any

from hft_megatron.config.adapters import ADAPTER_PARTS
from hft_megatron.config.derived import layers_per_stage
from hft_megatron.config.parallel import pipeline_words
from hft_megatron.costs.rank_costs import RankCosts
from hft_megatron.costs.rank_memory import in_bytes
from hft_megatron.hft.plan import CategoryCount, Plan
from hft_megatron.hft.units import EMBEDDING_NAME, FINAL_NORM_NAME, LM_HEAD_NAME
from hft_megatron.report.plan import MemoryReport, PlanReport, StageCosts, memory_record, memory_text
from hft_megatron.report.plan_time import TimeReport, time_record, time_text
from hft_megatron.report.tables import table_lines

UNIT_LETTERS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("q", "self_attn.q_proj"), ("k", "self_attn.k_proj"), ("v", "self_attn.v_proj"), ("o", "self_attn.o_proj")),
    (("g", "mlp.gate_proj"), ("u", "mlp.up_proj"), ("d", "mlp.down_proj")),
    (("i", "input_layernorm"), ("p", "post_attention_layernorm")),
)
"""The columns of the grid, by category: letter and module of a layer."""
OUTER_ROWS = (("embedding", EMBEDDING_NAME), ("final norm", FINAL_NORM_NAME), ("lm_head", LM_HEAD_NAME))
TRAINABLE, FROZEN, ADAPTED = "#", ".", "a"
LINE_WIDTH = 100
"""Columns that the grids of several rounds may fill side by side; fixed, so that output can be compared."""
MOST_ROWS_PER_STAGE = 4
COLUMNS = ("stage", "DP ranks", "trainable", "gradients", "optimizer", "reduce-scatter", "all-gather")
_SEPARATOR = "   "


def report_text(
    report: PlanReport,
    memory: MemoryReport | None = None,
    time: TimeReport | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Everything about the plans, for a person: ``notes`` on the model, plans in words, grid, costs, and the results of
    --memory and --time."""
    lines = [
        *notes,
        *_setting(report),
        "",
        *(plan.describe() for plan in report.plans),
        "",
        *_legend(report),
        *_grids(report),
    ]
    for plan, costs in zip(report.plans, report.by_round, strict=True):
        lines += ["", f"round {plan.round}, per rank and step, and as a share of full fine-tuning:"]
        lines += _table(report, costs)
    if report.half is not None:
        lines += ["", "half fine-tuning (by default draws) on the same layout, and as a share of full fine-tuning:"]
        lines += _table(report, report.half)
    if memory is not None:
        lines += ["", *memory_text(memory)]
    if time is not None:
        lines += ["", *time_text(time)]
    return "\n".join(lines)


def _setting(report: PlanReport) -> Iterator[str]:
    model, parallel = report.model, report.parallel
    yield f"a LLaMA of {report.shape.parameter_count():,} parameters in {report.shape.num_layers} layers"
    tensor, pipeline = parallel.tensor_model_parallel_size, pipeline_words(parallel, report.shape.num_layers)
    weights = f"{'bf16' if model.bf16 else 'fp32'} weights"
    if model.bf16 and not model.fp32_gradients:
        weights += " and gradients"
    yield f"TP {tensor} x {pipeline} x DP {model.data_size}, world size {model.world_size:,}, {weights}"


def _legend(report: PlanReport) -> Iterator[str]:
    adapters = "" if report.shape.adapters is None else f", {ADAPTED} frozen, with a trainable adapter"
    yield f"{TRAINABLE} trainable, {FROZEN} frozen{adapters}"
    for category in UNIT_LETTERS:
        yield "  " + ", ".join(f"{letter} {module}" for letter, module in category)


def _grids(report: PlanReport) -> Iterator[str]:
    """One row per layer; as many rounds side by side as a line holds, the others below."""
    stages = report.stage_of_layers() if report.parallel.pipeline_model_parallel_size > 1 else {}
    width = len(_cells(None, 0))
    side_by_side = (LINE_WIDTH - len(_label("", None))) // (width + len(_SEPARATOR))
    for first in range(0, len(report.plans), side_by_side):
        plans = report.plans[first : first + side_by_side]

        def row(label: str, cells: Sequence[str], stage: int | None = None) -> str:
            padded = (cell.ljust(width) for cell in cells)
            return _SEPARATOR.join([_label(label, stage), *padded]).rstrip()

        yield ""
        yield row("", [f"round {plan.round}" for plan in plans])
        yield row("layer", [_cells(None, 0) for _ in plans])
        (embedding, *after), known = OUTER_ROWS, {unit.name for unit in plans[0].units}
        yield row(embedding[0], [_mark(plan, embedding[1]) for plan in plans])
        for layer in range(report.shape.num_layers):
            yield row(str(layer), [_cells(plan, layer) for plan in plans], stages.get(layer))
        for label, name in after:
            if name in known:
                yield row(label, [_mark(plan, name) for plan in plans])


def _label(text: str, stage: int | None) -> str:
    return f"{'' if stage is None else f'PP {stage}':<6}{text:>10}"


def _cells(plan: Plan | None, layer: int) -> str:
    """Marks of a layer's units, or their letters without a plan."""
    return " ".join(
        "".join(letter if plan is None else _mark(plan, f"model.layers.{layer}.{module}") for letter, module in units)
        for units in UNIT_LETTERS
    )


def _mark(plan: Plan, unit: str) -> str:
    if f"{unit}.{ADAPTER_PARTS[0]}" in plan.training:
        return ADAPTED
    return TRAINABLE if plan.trains(unit) else FROZEN


def _table(report: PlanReport, costs: StageCosts) -> Iterator[str]:
    rows: list[Sequence[str]] = [COLUMNS]
    for stage, (ranks, full) in enumerate(zip(costs, report.full, strict=True)):
        for numbers, one, one_full in _alike(ranks, full):
            rows.append((f"PP {stage}", numbers, *_shown(one, one_full)))
    # A sum of parameters would count every data-parallel copy; the plan's own line has the number.
    rows.append(("all ranks", "", "", *_shown(report.total(costs), report.total(report.full))[1:]))
    return table_lines(rows, left=2)


def _alike(ranks: Sequence[RankCosts], full: Sequence[RankCosts]) -> list[tuple[str, RankCosts, RankCosts]]:
    """(data-parallel ranks, their costs, those of full fine-tuning) for groups of ranks that have both in common.

    Only optimizer bytes differ between the ranks of a stage, because of padding. With too many groups to read, the
    largest represents all; the JSON has every rank.
    """
    groups: dict[tuple[RankCosts, RankCosts], list[int]] = {}
    for number, pair in enumerate(zip(ranks, full, strict=True)):
        groups.setdefault(pair, []).append(number)
    if len(groups) <= MOST_ROWS_PER_STAGE:
        return [(_spans(numbers), *pair) for pair, numbers in groups.items()]
    largest, largest_full = (max(rank.optimizer_bytes for rank in group) for group in (ranks, full))
    row = (replace(ranks[0], optimizer_bytes=largest), replace(full[0], optimizer_bytes=largest_full))
    return [(f"0-{len(ranks) - 1}, at most", *row)]


def _spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as ``0-3, 5``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _shown(costs: RankCosts, full: RankCosts) -> list[str]:
    parameters, *sizes = astuple(costs)
    shown = [f"{parameters:,}", *(in_bytes(size, precision=2) for size in sizes)]
    shares = [None if whole == 0 else part / whole for part, whole in zip(astuple(costs), astuple(full), strict=True)]
    return [text if share is None else f"{text} ({share:.1%})" for text, share in zip(shown, shares, strict=True)]


def report_json(
    report: PlanReport,
    memory: MemoryReport | None = None,
    time: TimeReport | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The report as JSON. ``digest`` is that of the first round, which a run also writes to its log; ``ranks`` are in
    the order of ranks, with bytes of one rank and step."""
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
    if report.half is not None:
        record["half_fine_tuning"] = {"ranks": list(_ranks(report, report.half))}
    if memory is not None:
        record["memory"] = memory_record(memory)
    if time is not None:
        record["time"] = time_record(time)
    if notes:
        record["notes"] = list(notes)
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
    """Costs of every rank, numbered over tensor, then data, then pipeline parallelism (megatron-core's order
    ``tp-cp-ep-dp-pp``)."""
    tensor_size, rank = report.parallel.tensor_model_parallel_size, 0
    for stage, replicas in enumerate(costs):
        for replica, one in enumerate(replicas):
            for tensor_rank in range(tensor_size):
                yield {"rank": rank, "tp": tensor_rank, "pp": stage, "dp": replica, **vars(one)}
                rank += 1


def _compact(value: Any, indent: str = "") -> str:
    """JSON with one line for each value without objects in it: a rank, a layer, a list of names."""
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
