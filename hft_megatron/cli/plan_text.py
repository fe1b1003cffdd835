"""``hft-megatron plan`` on a terminal: the grid of layers and units, and a table of costs per rank."""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace

from hft_megatron.cli.plan_memory import MemoryReport, memory_text
from hft_megatron.cli.plan_report import PlanReport, StageCosts
from hft_megatron.config.pipeline_rules import pipeline_words
from hft_megatron.hft.plan import Plan
from hft_megatron.hft.units import EMBEDDING_NAME, FINAL_NORM_NAME, LM_HEAD_NAME
from hft_megatron.optimizer.rank_costs import RankCosts

UNIT_LETTERS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("q", "self_attn.q_proj"), ("k", "self_attn.k_proj"), ("v", "self_attn.v_proj"), ("o", "self_attn.o_proj")),
    (("g", "mlp.gate_proj"), ("u", "mlp.up_proj"), ("d", "mlp.down_proj")),
    (("i", "input_layernorm"), ("p", "post_attention_layernorm")),
)
"""The columns of the grid, by category: letter and module of a layer."""
OUTER_ROWS = (("embedding", EMBEDDING_NAME), ("final norm", FINAL_NORM_NAME), ("lm_head", LM_HEAD_NAME))
TRAINS, RESTS = "#", "."
LINE_WIDTH = 100
"""Columns that the grids of several rounds may fill side by side; fixed, so that output can be compared."""
MOST_ROWS_PER_STAGE = 4
COLUMNS = ("stage", "DP ranks", "trainable", "gradients", "optimizer", "reduce-scatter", "all-gather")
_SEPARATOR = "   "


def report_text(report: PlanReport, memory: MemoryReport | None = None) -> str:
    """Everything about the plans, for a person: plans in words, grid, costs, and what --memory asks for."""
    lines = [
        *_setting(report),
        "",
        *(plan.describe() for plan in report.plans),
        "",
        *_legend(),
        *_grids(report),
    ]
    for plan, costs in zip(report.plans, report.by_round, strict=True):
        lines += ["", f"round {plan.round}, per rank and step, and as a share of full fine-tuning:"]
        lines += _table(report, costs)
    if memory is not None:
        lines += ["", *memory_text(memory)]
    return "\n".join(lines)


def _setting(report: PlanReport) -> Iterator[str]:
    model, parallel = report.model, report.parallel
    yield f"a LLaMA of {report.shape.parameter_count():,} parameters in {report.shape.num_layers} layers"
    tensor, pipeline = parallel.tensor_model_parallel_size, pipeline_words(parallel, report.shape.num_layers)
    dtype = "bf16" if model.bf16 else "fp32"
    yield f"TP {tensor} x {pipeline} x DP {model.data_size}, world size {model.world_size:,}, {dtype} weights"


def _legend() -> Iterator[str]:
    yield f"{TRAINS} trains, {RESTS} rests"
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
    return TRAINS if plan.trains(unit) else RESTS


def _table(report: PlanReport, costs: StageCosts) -> Iterator[str]:
    rows: list[Sequence[str]] = [COLUMNS]
    for stage, (ranks, full) in enumerate(zip(costs, report.full, strict=True)):
        for numbers, one, one_full in _alike(ranks, full):
            rows.append((f"PP {stage}", numbers, *_shown(one, one_full)))
    # A sum of parameters would count every data-parallel copy; the plan's own line has the number.
    rows.append(("all ranks", "", "", *_shown(report.total(costs), report.total(report.full))[1:]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        padded += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        yield "  " + "  ".join(padded)


def _alike(ranks: Sequence[RankCosts], full: Sequence[RankCosts]) -> list[tuple[str, RankCosts, RankCosts]]:
    """(data-parallel ranks, their costs, those of full fine-tuning) of ranks that have both in common.

    Only optimizer bytes differ between the ranks of a stage, by where buffers are padded. When that makes more kinds
    than a person wants to read, the largest stands for all; the JSON has every rank.
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
    shown = [f"{parameters:,}", *(_size(size) for size in sizes)]
    shares = [None if whole == 0 else part / whole for part, whole in zip(astuple(costs), astuple(full), strict=True)]
    return [text if share is None else f"{text} ({share:.1%})" for text, share in zip(shown, shares, strict=True)]


def _size(count: int) -> str:
    """Bytes in decimal units."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
