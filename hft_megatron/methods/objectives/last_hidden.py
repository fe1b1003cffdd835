"""A forward pass without gradients up to the head, whose logits are then made for a chunk of tokens at a time."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from hft_megatron.data.batches import StepBatch
from hft_megatron.methods.next_token import forward
from hft_megatron.model.adapters import adapters_off
from hft_megatron.model.llama import LlamaModel
from hft_megatron.trainer.method import LossFunction, MicroBatch, forward_pass

BASE_HIDDEN = "hidden states of the first weights"
"""Key in a micro-batch: (s / tp or s, b, h)."""
_FOUND = "found"

Look = Callable[[Tensor, LlamaModel], Tensor]
"""Function of the last stage's hidden states (s / tp or s, b, h)."""


def model_of(chunk: torch.nn.Module) -> LlamaModel:
    """The chunk, or the one that megatron-core's ``DistributedDataParallel`` has wrapped."""
    return cast(LlamaModel, getattr(chunk, "module", chunk))


def _step(batches: Iterator[MicroBatch], chunk: torch.nn.Module, *, look: Look) -> tuple[Tensor, LossFunction]:
    model = model_of(chunk)
    with model.keeping_hidden_states():
        output = forward(chunk, next(batches))

    def report(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tokens = torch.ones((), dtype=torch.int, device=hidden.device)
        return hidden.new_zeros(()), tokens, {_FOUND: look(hidden, model)}

    return output, report


def look_at_hidden_states(look: Look, chunks: Sequence[LlamaModel], batch: StepBatch) -> list[Tensor]:
    """Applies ``look`` to each micro-batch; empty except on the last stage. Collective."""
    return [found[_FOUND] for found in forward_pass(partial(_step, look=look), chunks, batch)]


def attach_hidden_states(chunks: Sequence[LlamaModel], batch: StepBatch) -> None:
    """Gives each micro-batch the hidden states of the model with its adapters, on the last stage; collective."""
    hidden = look_at_hidden_states(lambda hidden, model: hidden, chunks, batch)
    for micro_batch, found in zip(batch.micro_batches, hidden, strict=False):
        micro_batch[BASE_HIDDEN] = found


def attach_without_adapters(chunks: Sequence[LlamaModel], batch: StepBatch) -> None:
    """The same of the model without its adapters."""
    with adapters_off(chunks):
        attach_hidden_states(chunks, batch)
