"""The reference that a run of adapters must equal: PEFT's own model in a plain PyTorch loop, one example at a time."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from hft_megatron.config.model_shape import ModelShape, load_hf_config
from tests.support.plain_run import learning_rate, parse, samples_of_files, token_loss


def peft_model(base: Path, adapter: Path, *, trains: bool = False) -> PeftModel:
    """PEFT's model of the two folders, in fp32."""
    model = LlamaForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter), is_trainable=trains)


def peft_run(words: Sequence[str], adapter: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Trains like ``hft-megatron sft WORDS`` from the adapter in a folder. Returns the losses, and the adapter's
    weights by the names of PEFT's files."""
    config = parse("sft", words)
    assert config.training.train_iters is not None
    folder, options = str(config.model.load_hf), config.optimizer
    model = peft_model(Path(folder), adapter, trains=True)
    samples, _ = samples_of_files("sft", config, ModelShape.from_hf_config(load_hf_config(folder), folder))
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(),
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
        weight_decay=options.weight_decay,
    )
    losses = []
    for step in range(config.training.train_iters):
        total, count = 0.0, 0
        for example in chain(*samples(step)):
            loss, tokens, _ = token_loss(model, example)
            loss.backward()
            total, count = total + loss.item(), count + tokens
        for parameter in trained.values():
            assert parameter.grad is not None
            parameter.grad /= count
        torch.nn.utils.clip_grad_norm_(trained.values(), options.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / count)
    return losses, {name: p.detach() for name, p in trained.items()}
