"""From the bills of single runs to medians, spreads and ratios, and from those to a Markdown table."""

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from table import MEGABYTE, aligned

METHODS = {"HFT": "0.5", "full": "1"}
"""The methods compared, by their --hft-ratio."""
_BYTES = {
    "reduced": "reduce-scattered per step, all ranks (MB)",
    "gathered": "all-gathered per step, all ranks (MB)",
    "gradients": "held as gradients, all ranks (MB)",
    "masters": "held as master weights, all ranks (MB)",
    "moments": "held as moments, all ranks (MB)",
}
_SUMS = ("reduced", "gathered", "wire")


def summarise(bills: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The summary of one configuration; ``bills[method]`` holds one bill per pair, in the order of the pairs.

    Milliseconds of a run are the mean over ranks of each rank's median step. Bytes are those of all ranks, for one step
    where they are sent; they are the same in every run, which is asserted.
    """
    first = bills["HFT"][0]
    found: dict[str, Any] = {"data type": "bf16" if first["bf16"] else "fp32"}
    times = {method: [_milliseconds(bill) for bill in bills[method]] for method in METHODS}
    for method in METHODS:
        sizes = [_sizes(bill) for bill in bills[method]]
        assert all(size == sizes[0] for size in sizes), "runs of one method sent different bytes"
        found[method] = {
            "trained parameters": bills[method][0]["trainable_parameters"],
            "parameters": bills[method][0]["trainable_parameters"] + bills[method][0]["frozen_parameters"],
            "bytes": sizes[0],
            "milliseconds": {part: _spread([run[part] for run in times[method]]) for part in times[method][0]},
        }
    found["milliseconds HFT / full"] = {
        part: _spread([half[part] / full[part] for half, full in zip(times["HFT"], times["full"], strict=True)])
        for part in times["HFT"][0]
    }
    return found


def _milliseconds(bill: Mapping[str, Any]) -> dict[str, float]:
    ranks = bill["ranks"]
    return {part: mean(rank["milliseconds"][part] for rank in ranks) for part in ranks[0]["milliseconds"]}


def _sizes(bill: Mapping[str, Any]) -> dict[str, float]:
    totals = bill["total_bytes"]
    return {name: totals[name]["measured"] / (bill["steps"] if name in _SUMS else 1) for name in totals}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(median(values), 4), "least": round(min(values), 4), "most": round(max(values), 4)}


def render(results: Mapping[str, Any]) -> str:
    """A Markdown table, one column per configuration: HFT and full fine-tuning, and their ratio."""
    configurations = results["configurations"]
    head = [f"{one['model']}, overlap {one['overlap']}, {one['data type']}" for one in configurations]
    rows = [["HFT / full", *head]]
    for part in configurations[0]["HFT"]["milliseconds"]:
        rows.append([f"{part} (ms)", *(_time_cell(one, part) for one in configurations)])
    for name, label in _BYTES.items():
        rows.append([label, *(_bytes_cell(one, name) for one in configurations)])
    return aligned(rows)


def _time_cell(configuration: Mapping[str, Any], part: str) -> str:
    half, full = (configuration[method]["milliseconds"][part]["median"] for method in METHODS)
    ratio = configuration["milliseconds HFT / full"][part]
    return f"{half:.0f} / {full:.0f} = {ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


def _bytes_cell(configuration: Mapping[str, Any], name: str) -> str:
    half, full = (configuration[method]["bytes"][name] for method in METHODS)
    if full == 0:
        return "none"
    return f"{half / MEGABYTE:.1f} / {full / MEGABYTE:.1f} = {half / full:.2f}"
