"""The reference that the engine must equal: a plain PyTorch loop over transformers' LLaMA, with nothing of ours in it
but the batches and the plan."""

import math
from collections.abc import Callable, Mapping

import torch
from transformers import LlamaForCausalLM

from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.config.schema import HFTConfig, OptimizerConfig
from hft_megatron.data.batches import BatchShare
from hft_megatron.hft.plan import Plan, make_plan
from tests.support.toy_training import GLOBAL_BATCH, OPTIMIZER, SEED, STEPS, toy_batches, toy_samples


def toy_plan(folder: str, hft: HFTConfig) -> Plan:
    shape = ModelShape.from_hf_config(load_hf_config(folder), folder)
    return make_plan(shape, hft, default_seed=SEED)


def learning_rate(update: int, options: OptimizerConfig = OPTIMIZER) -> float:
    """Megatron's rate of update number ``update`` (from 0): linear from 0 over the warm-up, then a half cosine."""
    warmup = options.lr_warmup_iters
    if update < warmup:
        return options.lr * update / warmup
    done = (update - warmup) / (STEPS - warmup)
    return options.min_lr + (options.lr - options.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def plain_training(
    folder: str,
    plan: Plan,
    *,
    steps: int = STEPS,
    options: OptimizerConfig = OPTIMIZER,
    dtype: torch.dtype = torch.float32,
    micro_batch_size: int = GLOBAL_BATCH,
    packed: bool = False,
    step_batches: Callable[[int], list[dict[str, torch.Tensor]]] | None = None,
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms of ``steps`` steps on whole global batches, and the weights after them.

    ``packed``: on the examples that the engine's packs hold, each on its own in a row. ``step_batches`` gives the
    micro-batches of a step instead of the toy data's.

    In bf16 it does the engine's arithmetic: bf16 weights and products, fp32 sums over micro-batches and fp32 masters.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.removesuffix(".weight") in plan.training
    masters = {p: p.detach().float().clone() for p in model.parameters() if p.requires_grad}
    groups = [
        {"params": [m for m in masters.values() if m.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [m for m in masters.values() if m.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (options.adam_beta1, options.adam_beta2)
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=options.adam_eps)
    losses, norms = [], []
    for step in range(steps):
        batches = _micro_batches(step, micro_batch_size, packed) if step_batches is None else step_batches(step)
        losses.append(_accumulate(model, masters, batches))
        largest = options.clip_grad if options.clip_grad > 0 else math.inf
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), largest)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in masters.items():
                parameter.copy_(master)
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def _micro_batches(step: int, size: int, packed: bool) -> list[dict[str, torch.Tensor]]:
    """One example per row; of packs as well, whose number of examples differs from step to step."""
    samples = range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
    examples = [index for position in samples for index in toy_samples(packed=packed).sample(position)]
    share = BatchShare(
        micro_batch_size=len(examples) if packed else size,
        global_batch_size=len(examples),
        data_parallel_rank=0,
        data_parallel_size=1,
        length_multiple=1,
    )
    return toy_batches(share).assemble([(index,) for index in examples], packed=False).micro_batches


def _accumulate(
    model: LlamaForCausalLM,
    masters: Mapping[torch.nn.Parameter, torch.Tensor],
    micro_batches: list[dict[str, torch.Tensor]],
) -> float:
    """Fills the masters' gradients with the mean over all trained tokens of a step; returns their mean loss."""
    tokens = sum(float(batch["loss_mask"].sum()) for batch in micro_batches)
    for master in masters.values():
        master.grad = torch.zeros_like(master)
    total = 0.0
    for batch in micro_batches:
        logits = model(batch["tokens"]).logits.float()
        token_losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
        loss = (token_losses * batch["loss_mask"]).sum()
        model.zero_grad()
        loss.backward()
        for parameter, master in masters.items():
            assert parameter.grad is not None
            assert master.grad is not None
            master.grad += parameter.grad.float()
        total += loss.item()
    for master in masters.values():
        assert master.grad is not None
        master.grad /= tokens
    return total / tokens
