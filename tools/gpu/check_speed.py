"""Checks 8 to 10: training speed, compared with transformers, as a whole 7B model, and on long and packed sequences."""

import gc
import math
import time
from dataclasses import replace
from statistics import median
from typing import Any

from check_losses import FULL_RECOMPUTE
from made_inputs import make_tokenizer, write_even_examples
from measured_speed import LLAMA3_8B, SEVEN_B, TOY, WARM_UP_STEPS, Shape, figures_of, speed_of
from product import LOSS, Run, run
from working_site import Site, expect

STEPS = 8
FLOOR_TFLOPS = 350.0
"""Lowest model FLOPs of full fine-tuning, on an H100 or H200."""
PACKED_SHARE = 0.85
"""Lowest share of the unpacked tokens per second."""
PER_PACK = 20
FULL_NEEDS_BYTES = 130e9
"""Memory of a GPU that all of 7B needs to train: 121 GB of state, and activations."""
Figures = dict[str, Any]


def seven_b_layers(site: Site) -> Figures:
    """Check 8: 8 layers of the 7B shape at ratios 1 and 0.5, and transformers with SDPA in the same shape."""
    shape = TOY if site.toy else replace(SEVEN_B, layers=8)
    length, rows, batch = (64, 2, 4) if site.toy else (4096, 2, 4)
    found = {
        name: speed_of(
            _pretrain(
                site, shape, length, "--micro-batch-size", rows, "--global-batch-size", batch, "--hft-ratio", ratio
            ),
            shape,
            tokens=batch * length,
            example=length,
        )
        for name, ratio in (("full", 1.0), ("half", 0.5))
    }
    found["transformers"] = _transformers(site, shape, length, rows, batch // rows)
    if not site.toy:
        reached = found["full"]["model TFLOP/s"]
        expect(reached >= FLOOR_TFLOPS, f"{reached:.0f} model TFLOP/s are less than {FLOOR_TFLOPS:g}: {found}")
    return _flat(found)


def whole_seven_b(site: Site) -> Figures:
    """Check 9: half of 7B trains on one card, packed; all of it where the card's memory allows."""
    shape, length, batch, steps = (TOY, 320, 2, 4) if site.toy else (SEVEN_B, 4096, 8, 5)
    found = {"half": _whole(site, shape, length, batch, steps, ratio=0.5)}
    if site.toy or _card_bytes() >= FULL_NEEDS_BYTES:
        found["full"] = _whole(site, shape, length, batch, steps, ratio=1.0)
    return _flat(found)


def long_sequences(site: Site) -> Figures:
    """Check 10: 4 layers of the Llama-3-8B shape at 8k, packed 8k and 32k."""
    shape = TOY if site.toy else replace(LLAMA3_8B, layers=4)
    length, longest, batch = (320, 640, 2) if site.toy else (8192, 32768, 4)
    found = {
        "8k": speed_of(
            _pretrain(site, shape, length, "--global-batch-size", batch), shape, tokens=batch * length, example=length
        ),
        "packed": speed_of(
            _packed(site, shape, length, STEPS, "--global-batch-size", batch),
            shape,
            tokens=batch * length,
            example=length // PER_PACK,
        ),
        "32k": speed_of(
            _pretrain(site, shape, longest, "--global-batch-size", 1, *FULL_RECOMPUTE),
            shape,
            tokens=longest,
            example=longest,
        ),
    }
    share = found["packed"]["tokens/s"] / found["8k"]["tokens/s"]
    if not site.toy:
        expect(
            share >= PACKED_SHARE, f"packed, {share:.2f} of the tokens per second, less than {PACKED_SHARE}: {found}"
        )
    return {**_flat(found), "packed / 8k": share}


def _pretrain(site: Site, shape: Shape, length: int, *options: object) -> Run:
    words = ("--mock-data", "--tokenizer-model", make_tokenizer(site.folder / "bytes"), *shape.words(length))
    return _trained(run(site, "pretrain", *words, *_precision(site), "--train-iters", STEPS, *options), STEPS)


def _packed(site: Site, shape: Shape, length: int, steps: int, *options: object) -> Run:
    """Packs filled by ``PER_PACK`` examples."""
    data = site.folder / f"even-{length}.jsonl"
    if not data.exists():
        write_even_examples(data, tokens=length // PER_PACK, count=50 * PER_PACK)
    words = ("--train-data-path", data, "--tokenizer-model", make_tokenizer(site.folder / "bytes"), "--packing")
    shaped = ("--chat-template", "plain", *shape.words(length), *_precision(site))
    return _trained(run(site, "sft", *words, *shaped, "--train-iters", steps, *options), steps)


def _whole(site: Site, shape: Shape, length: int, batch: int, steps: int, *, ratio: float) -> Figures:
    options = ("--global-batch-size", batch, "--hft-ratio", ratio, *FULL_RECOMPUTE)
    found = _packed(site, shape, length, steps, *options)
    return speed_of(found, shape, tokens=batch * length, example=length // PER_PACK)


def _trained(found: Run, steps: int) -> Run:
    losses = found.values(LOSS)
    expect(len(losses) == steps and all(map(math.isfinite, losses)), f"the losses of {steps} steps are {losses}")
    return found


def _precision(site: Site) -> tuple[object, ...]:
    return ("--no-bf16" if site.toy else "--bf16", "--lr", 1e-5)


def _card_bytes() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def _transformers(site: Site, shape: Shape, length: int, rows: int, micro_batches: int) -> Figures:
    """A plain loop over transformers' model in bf16 with SDPA and a fused AdamW, on the same device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cpu" if site.toy else "cuda"
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=length,
        attn_implementation="sdpa",
    )
    config.use_cache = False
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.float32 if site.toy else torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        for _ in range(micro_batches):
            ids = torch.randint(shape.vocabulary, (rows, length), device=device)
            (model(input_ids=ids, labels=ids).loss / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not site.toy:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    peak = 0 if site.toy else torch.cuda.max_memory_allocated()
    del model, optimizer
    gc.collect()
    if not site.toy:
        torch.cuda.empty_cache()
    tokens = rows * length * micro_batches
    return {**figures_of(median(times[WARM_UP_STEPS:]), shape, tokens=tokens, example=length), "peak GB": peak / 1e9}


def _flat(found: dict[str, Figures]) -> Figures:
    return {f"{name}: {what}": value for name, figures in found.items() for what, value in figures.items()}
