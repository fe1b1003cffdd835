"""The output matrix and the token losses behind it, whose logits are never whole in memory where there are many.

Both are one autograd function that works through chunks of tokens. Logits of all tokens would be the largest tensor of
a step: at 8,192 tokens and 128k rows 4 GiB in fp32, which the backward pass needs again as a softmax.

- Up to ``WHOLE_BYTES`` (of ``loss_chunks``) of fp32 logits on a rank there is one chunk, and its softmax is kept:
  nothing is computed twice.
- Beyond, a chunk has at most ``CHUNK_BYTES``, nothing of it is kept but two numbers per token, and the backward pass
  computes its logits again: one more product to the three that a training head needs (two where it is frozen).

Each chunk adds its part to the weight gradient, and so reads and writes the whole of it: chunks are as large as memory
allows and not as small as possible. The loss itself is megatron-core's ``VocabParallelCrossEntropy``: in fp32, with the
same bits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from torch import Tensor

from hft_megatron.config.derived import tokens_of_a_chunk
from hft_megatron.model.linear import WeightGradient, gather_sequence, reduce_input_gradient


@dataclass(frozen=True, kw_only=True)
class _Share:
    """This tensor rank's part of the vocabulary, and how its input is laid out."""

    group: dist.ProcessGroup
    sequence_parallel: bool
    real_rows: int
    """Rows of the weight that are tokens; those behind them only pad the vocabulary."""


def hide_padded_rows(logits: Tensor, real_rows: int) -> None:
    """Makes the logits (..., rows) of rows that only pad the vocabulary minus infinity.

    Without that they take part in the softmax, and the loss depends on the tensor-parallel size.
    """
    if real_rows < logits.size(-1):
        logits[..., real_rows:] = float("-inf")


class _TokenLosses(torch.autograd.Function):
    """hidden (s / tp or s, b, h), weight (rows, h), labels (s, b) -> losses (s, b), fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, share: _Share) -> Tensor:
        ctx.share, ctx.parameter = share, weight
        flat, gathered = _whole_sequence(hidden, share)
        _wait_for(gathered)
        ctx.chunk = tokens_of_a_chunk(flat.size(0), weight.size(0))
        first_row = share.group.rank() * weight.size(0)
        ctx.is_kept = ctx.chunk == flat.size(0)
        of_tokens, kept = [], None
        for tokens, targets in zip(flat.split(ctx.chunk), labels.reshape(-1).split(ctx.chunk), strict=True):
            logits, maximum = VocabParallelCrossEntropy.calculate_logits_max(_logits(tokens, weight, share))
            _all_reduce(maximum, dist.ReduceOp.MAX, share.group)
            elsewhere, column, predicted, total, exponentials = VocabParallelCrossEntropy.calculate_predicted_logits(
                logits, targets, maximum, first_row, first_row + weight.size(0)
            )
            of_tokens.append((elsewhere, column, maximum, predicted, total))
            kept = exponentials if ctx.is_kept else None
            del logits, exponentials  # one memory, and room for the next chunk's
        elsewhere, column, maximum, predicted, total = (torch.cat(parts) for parts in zip(*of_tokens, strict=True))
        sums = torch.stack([predicted, total])
        _all_reduce(sums, dist.ReduceOp.SUM, share.group)
        predicted, total = sums
        needs_hidden = ctx.needs_input_grad[1] or not ctx.is_kept
        ctx.save_for_backward(hidden if needs_hidden else None, weight, elsewhere, column, maximum, total, kept)
        losses: Tensor = total.log() - predicted
        return losses.view_as(labels)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, elsewhere, column, maximum, total, exponentials = ctx.saved_tensors
        flat, gathered = (None, None) if hidden is None else _whole_sequence(hidden, ctx.share)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = weight.new_empty((*grad_losses.shape, weight.size(1))) if needs_hidden else None
        grad_weight = WeightGradient(ctx.parameter) if needs_weight else None
        result, reduced = None, None
        for start in range(0, total.size(0), ctx.chunk):
            of_chunk = slice(start, start + ctx.chunk)
            if not ctx.is_kept:
                assert flat is not None
                _wait_for(gathered)
                exponentials = _logits(flat[of_chunk], weight, ctx.share).float()
                exponentials.sub_(maximum[of_chunk, None]).exp_()
            softmax = exponentials.div_(total[of_chunk, None])
            gradients = grad_losses.reshape(-1)[of_chunk]
            grad_logits = _logit_gradients(softmax, elsewhere[of_chunk], column[of_chunk], gradients).to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden.flatten(0, 1)[of_chunk])
                if of_chunk.stop >= total.size(0):  # travels while the last weight gradient is computed
                    result, reduced = reduce_input_gradient(grad_hidden, ctx.share.group, ctx.share.sequence_parallel)
            if grad_weight is not None:
                assert flat is not None
                _wait_for(gathered)
                grad_weight.add(grad_logits, flat[of_chunk])
            del exponentials, softmax, grad_logits  # room for the next chunk's
        _wait_for(reduced)
        return result, None if grad_weight is None else grad_weight.for_autograd(), None, None


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)


def _whole_sequence(hidden: Tensor, share: _Share) -> tuple[Tensor, dist.Work | None]:
    """(s / tp or s, b, h) -> (s x b, h), and what to wait for before it is read."""
    gathered = None
    if share.sequence_parallel:
        hidden, gathered = gather_sequence(hidden, share.group)
    return hidden.reshape(-1, hidden.size(-1)), gathered


def _wait_for(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()


def _logits(tokens: Tensor, weight: Tensor, share: _Share) -> Tensor:
    """(tokens, h) -> (tokens, rows)."""
    logits = tokens.mm(weight.t())
    hide_padded_rows(logits, share.real_rows)
    return logits


def _logit_gradients(softmax: Tensor, elsewhere: Tensor, column: Tensor, grad_losses: Tensor) -> Tensor:
    """``(softmax - [row is the label]) x gradient of the loss``, (tokens, rows), in the softmax's memory."""
    rows, number, is_here, gradients = VocabParallelCrossEntropy.prepare_gradient_calculation_operands(
        softmax, elsewhere
    )
    result: Tensor = VocabParallelCrossEntropy.calculate_gradients(
        rows, number, column, is_here, gradients, grad_losses
    )
    return result


class VocabularyHead(ColumnParallelLinear):
    """megatron-core's output matrix, which can give token losses in place of logits.

    It takes over the weight of the one that ``GPTModel`` makes, with the marks that are set on it; there is none where
    the embedding of the same stage is used.

    forward: (s / tp or s, b, h) -> logits (s, b, rows), or with labels (s, b) losses in nats (s, b), fp32; and None.
    """

    def __init__(self, made: ColumnParallelLinear, config: ModelParallelConfig, *, real_rows: int) -> None:
        super().__init__(
            made.input_size,
            made.output_size,
            config=config,
            init_method=torch.nn.init.zeros_,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=made.tp_group,
        )
        self.weight = made.weight
        self.real_rows = real_rows

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        if labels is None:
            assert not runtime_gather_output, "rows are hidden by their number on this rank"
            logits, _ = super().forward(input_, weight, runtime_gather_output)
            hide_padded_rows(logits, self.real_rows)
            return logits, None
        share = _Share(group=self.tp_group, sequence_parallel=self.sequence_parallel, real_rows=self.real_rows)
        losses: Tensor = _TokenLosses.apply(input_, self.weight if weight is None else weight, labels, share)
        return losses, None
