"""The reference that the engine must equal: a plain PyTorch loop over transformers' LLaMA, with nothing of ours in it
but the batches and the plan."""

import math

import torch
from transformers import LlamaForCausalLM

from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.config.schema import HFTConfig
from hft_megatron.data.batches import BatchShare
from hft_megatron.hft.plan import Plan, make_plan
from tests.support.toy_training import GLOBAL_BATCH, OPTIMIZER, SEED, STEPS, toy_batches


def toy_plan(folder: str, ratio: float) -> Plan:
    shape = ModelShape.from_hf_config(load_hf_config(folder), folder)
    return make_plan(shape, HFTConfig(hft_ratio=ratio), default_seed=SEED)


def learning_rate(update: int) -> float:
    """Megatron's rate of update number ``update`` (from 0): linear from 0 over the warm-up, then a half cosine."""
    options, warmup = OPTIMIZER, OPTIMIZER.lr_warmup_iters
    if update <= warmup:
        return options.lr * update / warmup
    done = (update - warmup) / (STEPS - warmup)
    return options.min_lr + (options.lr - options.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def plain_training(folder: str, plan: Plan) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms of ``STEPS`` steps on whole global batches, and the weights after them."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.removesuffix(".weight") in plan.training
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in training if p.dim() > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in training if p.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2)
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=OPTIMIZER.adam_eps)
    share = BatchShare(
        micro_batch_size=GLOBAL_BATCH,
        global_batch_size=GLOBAL_BATCH,
        data_parallel_rank=0,
        data_parallel_size=1,
        length_multiple=1,
    )
    batches = toy_batches(share)
    losses, norms = [], []
    for step in range(STEPS):
        (batch,) = batches.step(step * GLOBAL_BATCH).micro_batches
        logits = model(batch["tokens"]).logits
        token_losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
        loss = (token_losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(training, OPTIMIZER.clip_grad)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}
