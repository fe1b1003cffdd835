"""The embedding of tokens, whose gradient goes into the gradient buffer row by row.

Autograd's own is a matrix of the embedding's size, which is made, cleared and added up in every backward pass although
only the rows of a micro-batch's tokens are other than zero; where the head is the same matrix there are two of them and
their sum.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import Parameter

from hft_megatron.model.linear import WeightGradient


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Parameter, is_head: bool) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.is_head = weight, is_head
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor | None, None]:
        (tokens,) = ctx.saved_tensors
        gradient = WeightGradient(ctx.weight)
        gradient.add_rows(tokens.flatten(), grad_output.flatten(0, -2))
        # Of a matrix that is the head as well autograd has the head's part, for which DDP's hook waits.
        is_done = ctx.is_head and gradient.is_main_grad
        return None, None if is_done else gradient.for_autograd(), None


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, weight: Parameter) -> Tensor:
        ctx.weight = weight
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor]:
        gradient = WeightGradient(ctx.weight)
        nothing = torch.empty(0, dtype=torch.int64, device=grad_output.device)
        gradient.add_rows(nothing, grad_output.new_empty((0, ctx.weight.size(1))))
        return None, gradient.for_autograd()


def without_gradient(output: Tensor, weight: Parameter) -> Tensor:
    """``output`` (..., h) as an output of the embedding with a gradient of zero: the weight has its gradient in every
    step, and layers above compute one of their input."""
    found: Tensor = _NoGradient.apply(output, weight)
    return found


class TokenEmbedding(VocabParallelEmbedding):
    """megatron-core's embedding, made from the one that ``GPTModel`` makes, with its weight and marks.

    forward: tokens (b, s) -> (b, s, h), or with sequence parallelism (s / tp, b, h).
    """

    def __init__(self, made: VocabParallelEmbedding, *, is_head: bool) -> None:
        """``is_head`` is true if the same stage also uses the weight as its head."""
        # Not megatron-core's constructor, which would make a second weight.
        torch.nn.Module.__init__(self)
        self.__dict__.update(made.__dict__)
        self.is_head = is_head
        # Asks the head for zeros, to which autograd would add the embedding's gradient, and DDP's hook for the sum.
        self.weight.__dict__.pop("zero_out_wgrad", None)

    def forward(self, input_: Tensor) -> Tensor:
        several = self.tp_group.size() > 1
        tokens = input_
        if several:
            elsewhere = (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index)
            tokens = (input_ - self.vocab_start_index).masked_fill(elsewhere, 0)
        rows: Tensor = _Rows.apply(tokens, self.weight, self.is_head)
        if several:
            rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if self.reduce_scatter_embeddings:
            rows = rows.transpose(0, 1).contiguous()
            rows = reduce_scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        else:
            rows = reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)
        return rows
