"""Checks 1, 3 and 5: logits as transformers', bf16 near fp32, frozen weights that stay, and equal bits twice."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from check_losses import RECIPE, ROUNDS, STEPS, inputs, learn
from made_inputs import VARIANTS, make_model
from product import LOSS, clean_up, run
from working_site import REPOSITORY, Site, expect

CONVERT = REPOSITORY / "tools" / "convert_checkpoint.py"
BF16_TOLERANCE = 2e-2
"""Tolerance of a loss, relative to fp32's."""
SHORT = ("--train-iters", 6)


def logits(site: Site) -> dict[str, Any]:
    """Check 1: ``tools/convert_checkpoint.py --check`` of each kind of model; it computes ours on the device."""
    for name, settings in VARIANTS.items():
        folder = make_model(site.new_folder(name), **settings)
        code = _code_of(CONVERT, "--load-hf", str(folder), "--check")
        expect(code == 0, f"{name}: the logits differ from transformers' (exit code {code}); the log says by how much")
    return {"models": len(VARIANTS)}


def _code_of(program: Path, *words: str) -> int:
    with patch.object(sys, "argv", [str(program), *words]):
        try:
            runpy.run_path(str(program), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            clean_up()
    return 0


def bf16_and_audit(site: Site) -> dict[str, Any]:
    """Check 3: losses in bf16, under the audit; then a frozen weight is changed, and the audit must report it."""
    model, data = inputs(site)
    words = ("--load-hf", model, "--train-data-path", data, *RECIPE, "--hft-audit")
    folder = site.new_folder("audited")
    found = run(site, "sft", *words, "--bf16", save=folder)
    reference = learn(site, "plain").values(LOSS)
    values = found.values(LOSS)
    expect(len(values) == STEPS, f"{len(values)} of {STEPS} steps have a loss")
    far = max(abs(one - other) / other for one, other in zip(values, reference, strict=True))
    expect(far <= BF16_TOLERANCE, f"bf16's losses are off by {far:.2g}, more than {BF16_TOLERANCE:g}")
    expect("no frozen shard has changed" in found.said, "the audit of the round has reported nothing")
    frozen = _frozen_bits(folder, model)
    with _writing_to_a_frozen_weight():
        refused = run(site, "sft", *words, "--bf16", *SHORT, exit_code=1)
    expect("1 frozen shard changed" in refused.said, f"the audit missed a change: {refused.said[-600:]}")
    return {"bf16 off by": far, "frozen matrices": frozen}


def _frozen_bits(folder: Path, model: Path) -> int:
    """Number of units that were frozen in a run, each with the bits of the model rounded to bf16."""
    import torch
    from safetensors.torch import load_file

    from hft_megatron.checkpoint.saved_run import SavedRun
    from hft_megatron.checkpoint.tensors import CheckpointTensors
    from hft_megatron.hft.units import units_of
    from hft_megatron.trainer.convert import units_trained

    saved = SavedRun.read(str(folder), None)
    tensors, trained = CheckpointTensors(saved.checkpoint, saved.identity.shape), units_trained(saved)
    before = load_file(model / "model.safetensors")
    units = [unit.name for unit in units_of(saved.identity.shape)]
    for unit in units:
        is_same = torch.equal(tensors.read(unit).cpu(), before[f"{unit}.weight"].bfloat16())
        expect(is_same or unit in trained, f"{unit} was frozen but has changed")
        # The few weights of a norm are near 1, where a whole step can be less than half of bf16's.
        is_norm = before[f"{unit}.weight"].dim() == 1
        expect(not is_same or unit not in trained or is_norm, f"{unit} trained but has not changed")
    return len(units) - len(trained)


def _writing_to_a_frozen_weight() -> Any:
    """Adds to one frozen weight in every step of a run within the context, as a bug in the engine would."""
    import torch

    from hft_megatron.model.parameters import parameter_slots
    from hft_megatron.trainer import loop

    take_step = vars(loop)["train_step"]

    def disturbed(of_run: Any) -> Any:
        result = take_step(of_run)
        slots = parameter_slots(of_run.wrapped.modules)
        weight = next(slot.parameter for slot in slots if not slot.parameter.requires_grad)
        with torch.no_grad():
            weight.view(-1)[0].add_(1.0)
        return result

    return patch.object(loop, "train_step", disturbed)


def deterministic(site: Site) -> dict[str, Any]:
    """Check 5: a run in bf16 with rounds twice, packed and not: equal losses, norms and weights, bit for bit."""
    model, data = inputs(site)
    words = ("--load-hf", model, "--train-data-path", data, *RECIPE, *ROUNDS, "--bf16", "--deterministic-mode", *SHORT)
    for name, options in {"unpacked": (), "packed": ("--packing", "--micro-batch-size", 1)}.items():
        exports = [site.new_folder("export"), site.new_folder("export")]
        first, second = (run(site, "sft", *words, *options, "--save-hf", export) for export in exports)
        expect(first.bits == second.bits, f"{name}: two runs differ: {json.dumps([first.bits, second.bits])}")
        files = [(export / "model.safetensors").read_bytes() for export in exports]
        expect(files[0] == files[1], f"{name}: the weights of two runs differ, and their losses don't")
    return {}
