"""Checks 2 and 13: the same losses as on the CPU, step by step. As a program it writes ``reference.json``.

Run: ``python tools/gpu/acceptance.py --write-reference``. The losses are those of a CPU in fp32 with everything plain;
every other way to run, layout, device and version of megatron-core must give the same ones.
"""

import json
import platform
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from made_inputs import make_model, write_examples, write_pairs
from product import GRAD_NORM, LOSS, Run, run
from working_site import CheckFailed, Site, expect

REFERENCE = Path(__file__).with_name("reference.json")
STEPS = 20
RECIPE = (
    *("--train-iters", STEPS, "--global-batch-size", 4, "--micro-batch-size", 2, "--seq-length", 96),
    *("--lr", 2e-3, "--min-lr", 2e-4, "--lr-warmup-iters", 4, "--weight-decay", 0.1, "--clip-grad", 1.0),
    *("--chat-template", "plain", "--seed", 7),
)
ROUNDS = ("--hft-round-interval", 5, "--hft-rotation", "complementary")
SERIES: Mapping[str, tuple[object, ...]] = {
    "plain": (),
    "packed": ("--packing", "--micro-batch-size", 1),
    "rounds, reset": (*ROUNDS, "--hft-moments", "reset"),
    "rounds, carried": (*ROUNDS, "--hft-moments", "carry", "--hft-frozen-moments", "host"),
}
"""Options that decide the losses; each series has a reference."""
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", 4000)
FULL_RECOMPUTE = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", 1),
)
WAYS: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "plain": ("plain", ()),
    "overlap": ("plain", OVERLAP),
    "full recompute": ("plain", FULL_RECOMPUTE),
    "selective recompute": ("plain", ("--recompute-granularity", "selective")),
    "packed": ("packed", ()),
    "rounds, reset": ("rounds, reset", OVERLAP),
    "rounds, carried": ("rounds, carried", ()),
}
"""name -> (its series, options that must not change the losses)."""
NORM_TOLERANCE_RATIO = 10.0
"""Ratio of a gradient norm's tolerance to a loss's."""


def losses(site: Site) -> dict[str, Any]:
    """Check 2: every way to run against its reference; returns the largest relative differences."""
    worst: dict[str, Any] = {}
    for name, (series, options) in WAYS.items():
        worst[name] = compare(site, learn(site, series, *options), series)
    return worst


def learn(site: Site, series: str, *options: object) -> Run:
    """20 steps in fp32 of one of ``SERIES``; the model and the data are made once."""
    return run(site, "sft", *words_of(site, series), *options)


def words_of(site: Site, series: str) -> tuple[object, ...]:
    """The options of a run of ``series``."""
    model, data = inputs(site)
    return ("--load-hf", model, "--train-data-path", data, *RECIPE, "--no-bf16", *SERIES[series])


def inputs(site: Site) -> tuple[Path, Path]:
    """The folder of the small model, and the file of the examples."""
    model, data = site.folder / "model", site.folder / "data.jsonl"
    if site.rank == 0 and not data.exists():
        make_model(model)
        write_examples(data)
    site.meet()
    return model, data


def compare(site: Site, found: Run, series: str) -> float:
    """The largest relative difference of a loss from the reference; CheckFailed beyond the tolerance."""
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))["series"][series]
    worst: dict[str, float] = {}
    for name, tolerance in ((LOSS, site.tolerance), (GRAD_NORM, NORM_TOLERANCE_RATIO * site.tolerance)):
        values = found.values(name)
        expect(len(values) == STEPS, f"{series}: {len(values)} of {STEPS} steps have a {name}")
        far = [abs(one - other) / other for one, other in zip(values, reference[name], strict=True)]
        worst[name] = max(far)
        # So that a NaN loss is off too.
        first = next((step for step, off in enumerate(far) if not off <= tolerance), None)
        if first is not None:
            raise CheckFailed(
                f"{series}: the {name} of step {first + 1} is {values[first]!r} instead of {reference[name][first]!r}, "
                f"off by {far[first]:.2g} where {tolerance:g} is tolerated; the largest difference is {max(far):.2g}"
            )
    return worst[LOSS]


def methods(site: Site) -> dict[str, Any]:
    """Check 13: DPO's three references give the same losses, and a pretraining on mock data learns."""
    model, _ = inputs(site)
    pairs = write_pairs(site.folder / "pairs.jsonl")
    words: tuple[object, ...] = (
        *("--load-hf", model, "--train-data-path", pairs, "--train-iters", 6, "--global-batch-size", 4),
        *("--micro-batch-size", 2, "--seq-length", 64, "--lr", 1e-3, "--chat-template", "plain", "--no-bf16"),
    )
    kinds = {"precompute": ("--dpo-reference-cache", site.folder / "reference-cache"), "shared": (), "model": ()}
    found = {
        kind: run(site, "dpo", *words, "--dpo-reference", kind, *options).values("preference loss")
        for kind, options in kinds.items()
    }
    expect(len(found["model"]) == 6, f"of 6 preference losses there are {len(found['model'])}")
    expect(found["model"][-1] < found["model"][0], f"the preference loss does not fall: {found['model']}")
    far = max(
        abs(one - other) / other
        for kind in ("precompute", "shared")
        for one, other in zip(found[kind], found["model"], strict=True)
    )
    expect(far <= site.tolerance, f"DPO's references differ by {far:.2g}, more than {site.tolerance:g}: {found}")
    words = ("--load-hf", model, "--mock-data", "--seq-length", 64, "--train-iters", 10, "--lr", 2e-3)
    pretrained = run(site, "pretrain", *words, "--global-batch-size", 4, "--no-bf16").values(LOSS)
    expect(pretrained[-1] < pretrained[0], f"the pretraining's loss does not fall: {pretrained}")
    return {"references differ by": far, "mock data from": pretrained[0], "to": pretrained[-1]}


def write_reference() -> None:
    """Runs every series on this CPU and writes the file."""
    with tempfile.TemporaryDirectory(prefix="reference-") as folder:
        site = Site(folder=Path(folder), toy=True)
        series = {}
        for name in SERIES:
            found = learn(site, name)
            series[name] = {LOSS: found.values(LOSS), GRAD_NORM: found.values(GRAD_NORM)}
    made_by = {
        "command": "python tools/gpu/acceptance.py --write-reference",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "megatron-core", "numpy")},
    }
    REFERENCE.write_text(json.dumps({"made by": made_by, "series": series}, indent=1) + "\n", encoding="utf-8")
    print(f"written: {REFERENCE}")


if __name__ == "__main__":
    write_reference()
