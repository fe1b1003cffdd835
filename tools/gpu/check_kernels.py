"""Checks 6 and 7: the kernels of a step and its waits for the device; the sums of weight gradients."""

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from check_losses import RECIPE, inputs
from made_inputs import make_model
from product import clean_up, run
from working_site import Site, expect

LAYERS, BATCHES = (1, 2), (1, 2)
"""Layers of models, and micro-batches of a step: the differences between all four give the cost of one more of both."""
PROFILED_STEP = 3
KERNELS_PER_LAYER = 130
"""Forward and backward of a micro-batch, at ratio 1; 127 were counted on CPU before anything was fused."""
ATTENTION = re.compile(r"flash|cudnn.*sdpa|sdpa.*cudnn|fmha|varlen", re.IGNORECASE)
SOFTMAX = re.compile(r"softmax", re.IGNORECASE)
SYNCHRONIZED = "synchronizing CUDA operation"
WEIGHT_TOLERANCE = 1e-5
MICRO_BATCHES = 16


def kernels(site: Site) -> dict[str, Any]:
    """Check 6: profiles a step of two models, packed and not. On CPU operators are counted in place of kernels."""
    found: dict[str, Any] = {}
    for name, rows, options in (("unpacked", 2, ()), ("packed", 1, ("--packing",))):
        steps = {
            (layers, batches): _profile(site, layers, batches, rows, *options)
            for layers in LAYERS
            for batches in BATCHES
        }
        launched = _of_one_more({sizes: step.launched for sizes, step in steps.items()})
        waits = _of_one_more({sizes: step.waits for sizes, step in steps.items()})
        softmax = _of_one_more({sizes: step.softmax for sizes, step in steps.items()})
        attention = sorted(filter(ATTENTION.search, steps[2, 2].kernels))
        expect(bool(attention), f"{name}: no attention kernel among {sorted(steps[2, 2].kernels)}")
        expect(softmax == 0, f"{name}: a layer has {softmax} kernels of a softmax over scores that are in memory")
        expect(
            0 < launched <= KERNELS_PER_LAYER or site.toy,
            f"{name}: a layer launches {launched} kernels for a micro-batch, more than {KERNELS_PER_LAYER}",
        )
        expect(waits == 0, f"{name}: the host waits for the device {waits} times per layer and micro-batch")
        found |= {f"{name}, per layer": launched, f"{name}, waits": steps[2, 2].waits, f"{name}, by": attention[0][:60]}
    return found


def _of_one_more(count: dict[tuple[int, int], int]) -> int:
    """Cost of one more layer in one more micro-batch, by counts for (layers, micro-batches): the optimizer's part, and
    that of embedding and head, cancel out."""
    return (count[2, 2] - count[2, 1]) - (count[1, 2] - count[1, 1])


class _Step:
    """Counts of one step."""

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        """Kernels by name; on CPU operators, including nested ones."""
        self.launched = 0
        """Kernel launches; on CPU the outermost operators, because the nested ones are not our choice."""
        self.waits = 0
        """Waits of the host for the device; none are counted on CPU."""

    @property
    def softmax(self) -> int:
        """Softmax kernels outside of attention kernels; the loss has some too."""
        names = [name for name in self.kernels if SOFTMAX.search(name) and not ATTENTION.search(name)]
        return sum(self.kernels[name] for name in names)


def _profile(site: Site, layers: int, batches: int, rows: int, *options: object) -> _Step:
    _, data = inputs(site)
    model = make_model(site.new_folder("model"), num_hidden_layers=layers)
    found = _Step()
    words = ("--load-hf", model, "--train-data-path", data, *RECIPE, "--hft-ratio", 1)
    sizes = ("--global-batch-size", batches * rows, "--micro-batch-size", rows)
    short = (*sizes, "--train-iters", PROFILED_STEP + 1, "--lr-warmup-iters", 0)
    # bf16 on CPU is emulated by other operators.
    with _profiling(found):
        run(site, "sft", *words, *short, "--no-bf16" if site.toy else "--bf16", *options)
    return found


@contextlib.contextmanager
def _profiling(found: _Step) -> Iterator[None]:
    """Profiles the third step of a run within the context, and counts the fourth one's waits."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from hft_megatron.trainer import loop

    take_step = vars(loop)["train_step"]
    on_card = torch.cuda.is_available()

    def step(of_run: Any) -> Any:
        if of_run.state.iteration == PROFILED_STEP:
            return _counting_waits(of_run)
        if of_run.state.iteration != PROFILED_STEP - 1:
            return take_step(of_run)
        with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as profiler:
            result = take_step(of_run)
        for event in profiler.events():
            if event.device_type.name == "CUDA" and not event.name.startswith(("Memcpy", "Memset")):
                found.kernels[event.name] += 1
                found.launched += 1
            elif not on_card and event.name.startswith("aten::"):
                found.kernels[event.name] += 1
                found.launched += event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::")
        return result

    def _counting_waits(of_run: Any) -> Any:
        if not on_card:
            return take_step(of_run)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = take_step(of_run)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.waits = sum(SYNCHRONIZED in str(warning.message) for warning in said)
        return result

    with patch.object(loop, "train_step", step):
        yield


def weight_gradient(site: Site) -> dict[str, Any]:
    """Check 7: gradients of a layer's matrices, summed over micro-batches, against an exact product of them all."""
    import torch

    from hft_megatron.config.model import ModelConfig
    from hft_megatron.config.parallel import ParallelConfig
    from hft_megatron.config.training import TrainingConfig
    from hft_megatron.config.validation import shape_of
    from hft_megatron.model.build import build_model
    from hft_megatron.parallel.groups import start_backend, start_groups
    from hft_megatron.parallel.launch import place_this_process

    # No CPU kernel adds bf16 to fp32.
    dtype = torch.float32 if site.toy else torch.bfloat16
    size, inner, tokens = (64, 112, 32) if site.toy else (1024, 2816, 512)
    shape = shape_of(
        ModelConfig(
            num_layers=1,
            hidden_size=size,
            ffn_hidden_size=inner,
            num_attention_heads=8,
            vocab_size=128,
            max_position_embeddings=128,
        )
    )
    assert shape is not None
    place_this_process()
    start_backend(ParallelConfig())
    placement = start_groups(ParallelConfig(), 1, seed=0)
    [model] = build_model(shape, ParallelConfig(), TrainingConfig(bf16=not site.toy), placement=placement, dtype=dtype)
    layer = model.decoder.layers[0]
    modules = {
        "q, k, v": layer.self_attention.linear_qkv,
        "o": layer.self_attention.linear_proj,
        "gate, up": layer.mlp.linear_fc1,
        "down": layer.mlp.linear_fc2,
    }
    far = {name: _gradient_error(module, tokens) for name, module in modules.items()}
    clean_up()
    worst = max(far, key=far.__getitem__)
    expect(
        far[worst] <= WEIGHT_TOLERANCE,
        f"the gradient of {worst} over {MICRO_BATCHES} micro-batches is off by {far[worst]:.2g} of its largest entry, "
        f"more than {WEIGHT_TOLERANCE:g}: {far}",
    )
    return {"off by": far[worst], "worst": worst}


def _gradient_error(module: Any, tokens: int) -> float:
    """The largest error of a weight's gradient over all micro-batches, as a share of its largest entry."""
    import torch

    weights = list(module.parameters())
    exact = [torch.zeros(weight.shape, dtype=torch.float64, device=weight.device) for weight in weights]
    for weight in weights:
        weight.main_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        weight.grad_added_to_main_grad = False
    generator = torch.Generator(weights[0].device).manual_seed(0)

    def draw(*size: int) -> Any:
        return torch.randn(size, generator=generator, device=weights[0].device, dtype=torch.float32).to(
            weights[0].dtype
        )

    for _ in range(MICRO_BATCHES):
        given = draw(tokens, 1, weights[0].size(1)).requires_grad_()
        outputs = [output for output in module(given) if isinstance(output, torch.Tensor)]
        gradients = [draw(*output.shape) for output in outputs]
        torch.autograd.backward(outputs, gradients)
        for weight, total, gradient in zip(weights, exact, gradients, strict=True):
            # Like DDP's hook with the gradient from autograd.
            if not weight.grad_added_to_main_grad:
                weight.main_grad.add_(weight.grad)
            weight.grad, weight.grad_added_to_main_grad = None, False
            total.add_(gradient.flatten(0, 1).double().t() @ given.detach().flatten(0, 1).double())
    errors: list[float] = [
        ((weight.main_grad - total).abs().max() / total.abs().max()).item()
        for weight, total in zip(weights, exact, strict=True)
    ]
    return max(errors)
