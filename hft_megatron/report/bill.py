"""Text of a bill for a terminal."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

from hft_megatron.config.run_folder import BILL_FILE
from hft_megatron.costs.rank_memory import in_bytes
from hft_megatron.parallel.step_clock import ALL_GATHER_WAIT, REDUCE_SCATTER_WAIT
from hft_megatron.report.tables import table_lines
from hft_megatron.tracking.tracker import TOKENS_PER_SECOND

FROZEN_STATE = "resting"
"""Key in bill.json of the state of frozen units in host memory: their name in earlier versions."""
BYTE_ROWS = (
    ("reduced", "reduced per step"),
    ("gathered", "gathered per step"),
    ("wire", "sent to other ranks per step"),
    ("gradients", "held as gradients"),
    ("masters", "held as masters"),
    ("moments", "held as moments"),
    (FROZEN_STATE, "kept on the host"),
)


def bill_line(bill: Mapping[str, Any], folder: str | None) -> str:
    """One line of a bill's contents: steps, their mean time, tokens per second, and shares of full fine-tuning."""
    shares = [
        f"{_share(bill['total_bytes'][name])} of the bytes {label}"
        for name, label in BYTE_ROWS
        if name not in ("wire", FROZEN_STATE) and bill["total_bytes"][name]["full"]
    ]
    step = mean(rank["milliseconds"]["step"] for rank in bill["ranks"])
    place = f"; details are in {folder}/{BILL_FILE}" if folder is not None else ""
    return (
        f"> the bill: {bill['steps']} steps of {step:,.1f} ms, {bill['throughput'][TOKENS_PER_SECOND]:,.1f} "
        f"tokens/s/GPU; relative to full fine-tuning: {', '.join(shares)}{place}"
    )


def render_bill(bill: Mapping[str, Any], *, of: str | None = None) -> str:
    """The table of a bill.json's contents: bytes of the largest rank and of all ranks, milliseconds over ranks.

    ``of`` names the subject of the bill; its iterations when None.
    """
    layout = " x ".join(
        f"{short} {bill[size]}"
        for short, size in (
            ("TP", "tensor_model_parallel_size"),
            ("PP", "pipeline_model_parallel_size"),
            ("DP", "data_parallel_size"),
        )
    )
    of = of or f"iterations {bill['first_iteration']} to {bill['last_iteration']}"
    title = f"> the bill of {of}, measured on {layout}; the costs of full fine-tuning are by formula"
    rows = [*_byte_rows(bill), *_time_rows(bill)]
    rows += [[name, f"{value:,.1f}"] for name, value in bill["throughput"].items() if name != "formula"]
    rows += _peak_rows(bill)
    switches = bill["switches"]
    if switches["count"]:
        rows.append([f"ms per switch, mean of {switches['count']}", f"{switches['mean_ms']:.1f}"])
    return "\n".join([title, *table_lines(rows)])


def _byte_rows(bill: Mapping[str, Any]) -> list[list[str]]:
    rows = [["bytes", "largest rank", "full", "all ranks", "full", "share"]]
    for name, label in BYTE_ROWS:
        if name not in bill["total_bytes"]:  # of an earlier version
            continue
        per = bill["steps"] if name in ("reduced", "gathered", "wire") else 1
        of_rank = [rank["bytes"][name] for rank in bill["ranks"]]
        total = bill["total_bytes"][name]
        largest = [max(one[kind] for one in of_rank) for kind in ("measured", "full")]
        sizes = [in_bytes(value / per) for value in (*largest, total["measured"], total["full"])]
        rows.append([label, *sizes, _share(total)])
    return rows


def _time_rows(bill: Mapping[str, Any]) -> list[list[str]]:
    overlapped = {
        REDUCE_SCATTER_WAIT: bill["overlap_grad_reduce"],
        ALL_GATHER_WAIT: bill["overlap_param_gather"],
    }
    rows = [[f"ms per step, mean of {bill['timed_steps']}", "mean of ranks", "least", "most"]]
    for name in bill["ranks"][0]["milliseconds"]:
        values = [rank["milliseconds"][name] for rank in bill["ranks"]]
        kind = {True: " (exposed)", False: " (all of it)"}[overlapped[name]] if name in overlapped else ""
        rows.append([f"{name}{kind}", *(f"{value:.1f}" for value in (mean(values), min(values), max(values)))])
    return rows


def _peak_rows(bill: Mapping[str, Any]) -> list[list[str]]:
    peaks = [rank["peak"] for rank in bill["ranks"]]
    return [[name, *(f"{pick(peak[name] for peak in peaks):.2f}" for pick in (mean, min, max))] for name in peaks[0]]


def _share(sizes: Mapping[str, int]) -> str:
    return f"{sizes['measured'] / sizes['full']:.1%}" if sizes["full"] else "-"
