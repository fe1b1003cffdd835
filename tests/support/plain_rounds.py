"""The reference for rounds: one plain AdamW over transformers' LLaMA, whose weights take turns in having gradients."""

import torch
from transformers import LlamaForCausalLM

from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.config.schema import HFTConfig
from hft_megatron.data.batches import BatchShare
from hft_megatron.hft.plan import make_plan
from tests.support.toy_training import GLOBAL_BATCH, OPTIMIZER, SEED, toy_batches


def plain_rounds(folder: str, *, steps: int, interval: int, lr: float, keeps: str) -> list[float]:
    """Losses of ``steps`` steps at a constant rate, with a new plan every ``interval`` of them.

    ``keeps``: moments of ``nothing``, of what goes on ``training``, or of ``everything`` live on at a switch.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shape = ModelShape.from_hf_config(load_hf_config(folder), folder)
    named = {name.removesuffix(".weight"): parameter for name, parameter in model.named_parameters()}
    groups = [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2))
    share = BatchShare(
        micro_batch_size=GLOBAL_BATCH,
        global_batch_size=GLOBAL_BATCH,
        data_parallel_rank=0,
        data_parallel_size=1,
        length_multiple=1,
    )
    batches, losses = toy_batches(share), []
    for step in range(steps):
        if step % interval == 0:
            plan = make_plan(shape, HFTConfig(), default_seed=SEED, round=step // interval)
            for name, parameter in named.items():
                if keeps == "nothing" or (keeps == "training" and not (parameter.requires_grad and plan.trains(name))):
                    optimizer.state.pop(parameter, None)
                parameter.requires_grad = plan.trains(name)
        (batch,) = batches.step(step * GLOBAL_BATCH).micro_batches
        logits = model(batch["tokens"]).logits
        token_losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
        loss = (token_losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in named.values() if p.requires_grad], OPTIMIZER.clip_grad)
        optimizer.step()
        losses.append(loss.item())
    return losses
