"""Check 4: a stopped run resumes to the same bits, however it was saved and stopped; its export works."""

import json
import signal
from typing import Any

from check_losses import RECIPE, inputs
from product import Run, read_metrics, run, started, wait_for_steps
from working_site import Site, expect

STEPS, STOP_AT = 8, 4
LONG = 100_000
"""More steps than are taken before the signal."""
BEFORE_SIGNAL = 3
WORDS = (
    *(*RECIPE, "--no-bf16", "--deterministic-mode", "--lr-decay-style", "constant", "--lr-warmup-iters", 0),
    *("--hft-round-interval", 3, "--hft-moments", "carry", "--hft-frozen-moments", "host"),
)
"""Constant rates, so that a run can continue beyond its last step; the stop is within a round, and another one
follows."""


def saving(site: Site) -> dict[str, Any]:
    """Check 4, part by part."""
    model, data = inputs(site)
    words = ("--load-hf", model, "--train-data-path", data, *WORDS)
    export = site.new_folder("export")
    whole = run(site, "sft", *words, "--train-iters", STEPS, "--save-hf", export)
    for name, options in {"sync": (), "async": ("--async-save", "--save-interval", 2)}.items():
        folder, resumed_export = site.new_folder(name), site.new_folder("export")
        run(site, "sft", *words, *options, "--train-iters", STOP_AT, save=folder)
        last = (*options, "--train-iters", STEPS, "--load", folder, "--save-hf", resumed_export)
        resumed = run(site, "sft", *words, *last, save=folder)
        _same(resumed, whole, f"resumed after a {name} save")
        files = [(folder / "model.safetensors").read_bytes() for folder in (export, resumed_export)]
        expect(files[0] == files[1], f"{name}: the weights differ from those of the run that was not stopped")
    stopped_at = _stop_by_signal(site, words)
    _use(export)
    return {"SIGTERM at step": stopped_at}


def _same(found: Run, whole: Run, what: str) -> None:
    expect(
        found.bits == whole.bits,
        f"{what}: a run that was not stopped has other losses: {json.dumps(found.bits)} and {json.dumps(whole.bits)}",
    )


def _stop_by_signal(site: Site, words: tuple[object, ...]) -> int:
    """SIGTERM to a started run: exit code 3, and the resumed run has the steps of an uninterrupted one."""
    folder, log = site.new_folder("stopped"), site.folder / "stopped.log"
    with started(["sft", *words, "--train-iters", LONG, "--save", folder], log) as process:
        wait_for_steps(process, folder, BEFORE_SIGNAL, log)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    said = log.read_text(encoding="utf-8", errors="replace")
    expect(code == 3, f"after SIGTERM the exit code is {code} instead of 3: {said[-600:]}")
    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    expect(status["exit_code"] == 3, f"status.json says {status}")
    stopped_at = int(read_metrics(folder)[-1]["iteration"])
    last = stopped_at + 2
    resumed = run(site, "sft", *words, "--train-iters", last, "--load", folder, save=folder)
    _same(resumed, run(site, "sft", *words, "--train-iters", last), f"resumed after SIGTERM at step {stopped_at}")
    return stopped_at


def _use(export: Any) -> None:
    """transformers loads the export, and its output is a distribution over the tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    ids = tokenizer("Say 3", return_tensors="pt").input_ids
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss.item()
    expect(0 < loss < 20, f"the export's loss in transformers is {loss}")
