"""The output matrix and its token losses; where there are many tokens, logits are never whole in memory.

Both are one autograd function that works through chunks of tokens. Logits of all tokens would be the largest tensor of
a step: at 8,192 tokens and 128k rows 4 GiB in fp32, which the backward pass needs again as a softmax.

- Up to ``WHOLE_BYTES`` (of ``loss_chunks``) of fp32 logits on a rank there is one chunk, and its softmax is kept:
  nothing is computed twice.
- Beyond, a chunk has at most ``CHUNK_BYTES``, nothing of it is kept but two numbers per token, and the backward pass
  computes its logits again: one more product to the three that a training head needs (two where it is frozen).

Each chunk adds its part to the weight gradient, and so reads and writes the whole of it: chunks are as large as memory
allows and not as small as possible. The loss itself is megatron-core's ``VocabParallelCrossEntropy``: in fp32, with the
same bits.

Values of a token's distribution that an objective needs beside the loss come from the same chunks (``Beside``).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

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
    """This tensor rank's part of the vocabulary, and the layout of its input."""

    group: dist.ProcessGroup
    sequence_parallel: bool
    real_rows: int
    """Rows of the weight that are tokens; those after them only pad the vocabulary."""


def hide_padded_rows(logits: Tensor, real_rows: int) -> None:
    """Makes the logits (..., rows) of rows that only pad the vocabulary minus infinity.

    Without that they take part in the softmax, and the loss depends on the tensor-parallel size.
    """
    if real_rows < logits.size(-1):
        logits[..., real_rows:] = float("-inf")


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """Another model's last hidden states, after its final norm, and its head."""

    hidden: Tensor
    """(s / tp or s, b, h), of the same tokens."""
    weight: Tensor
    """(rows, h), this tensor rank's."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Values of each token's distribution to compute beside its loss."""

    entropy_of: int = 0
    """Number of the likeliest tokens that the entropy is of; 0: no entropy."""
    compared: ComparedModel | None = None
    """The model that the KL divergence is from; None: no divergence."""


class TokenValues(NamedTuple):
    """Values of every token, each (s, b) or (b, s), fp32, in nats."""

    losses: Tensor
    entropies: Tensor | None
    """Entropies of the likeliest tokens, their probabilities renormalised; no gradient flows through."""
    divergences: Tensor | None
    """KL(compared || this model); a gradient flows to this model alone."""

    def by_sequence(self) -> "TokenValues":
        """(s, b) -> (b, s)."""
        entropies, divergences = (None if one is None else one.t().contiguous() for one in self[1:])
        return TokenValues(self.losses.t().contiguous(), entropies, divergences)


class _TokenLosses(torch.autograd.Function):
    """hidden (s / tp or s, b, h), weight (rows, h), labels (s, b) -> losses (s, b), fp32; with ``Beside`` the three
    of ``TokenValues``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, share: _Share, beside: Beside | None = None
    ) -> Tensor | tuple[Tensor | None, ...]:
        ctx.share, ctx.parameter, ctx.divergence = share, weight, None
        entropies: list[Tensor] = []
        if beside is not None and beside.compared is not None:
            ctx.divergence = _Divergence(beside.compared, share)
            ctx.divergence.begin()
        flat, gathered = _whole_sequence(hidden, share)
        _wait_for(gathered)
        ctx.chunk = tokens_of_a_chunk(flat.size(0), weight.size(0))
        first_row = share.group.rank() * weight.size(0)
        ctx.is_kept = ctx.chunk == flat.size(0)
        of_tokens, kept = [], None
        for number, (tokens, targets) in enumerate(
            zip(flat.split(ctx.chunk), labels.reshape(-1).split(ctx.chunk), strict=True)
        ):
            logits, maximum = VocabParallelCrossEntropy.calculate_logits_max(_logits(tokens, weight, share))
            _all_reduce(maximum, dist.ReduceOp.MAX, share.group)
            if beside is not None and beside.entropy_of > 0:
                entropies.append(_entropy_of_likeliest(logits, beside.entropy_of, share.group))
            if ctx.divergence is not None:
                ctx.divergence.add(slice(number * ctx.chunk, (number + 1) * ctx.chunk), logits, maximum)
            elsewhere, column, predicted, total, exponentials = VocabParallelCrossEntropy.calculate_predicted_logits(
                logits, targets, maximum, first_row, first_row + weight.size(0)
            )
            of_tokens.append((elsewhere, column, maximum, predicted, total))
            kept = exponentials if ctx.is_kept else None
            del logits, exponentials  # frees their memory for the next chunk's
        elsewhere, column, maximum, predicted, total = (torch.cat(parts) for parts in zip(*of_tokens, strict=True))
        sums = torch.stack([predicted, total])
        _all_reduce(sums, dist.ReduceOp.SUM, share.group)
        predicted, total = sums
        needs_hidden = ctx.needs_input_grad[1] or not ctx.is_kept
        ctx.save_for_backward(hidden if needs_hidden else None, weight, elsewhere, column, maximum, total, kept)
        losses: Tensor = (total.log() - predicted).view_as(labels)
        if beside is None:
            return losses
        entropy = torch.cat(entropies).view_as(labels) if entropies else None
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return losses, entropy, None if ctx.divergence is None else ctx.divergence.values(total).view_as(labels)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, *grad_beside: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, elsewhere, column, maximum, total, exponentials = ctx.saved_tensors
        flat, gathered = (None, None) if hidden is None else _whole_sequence(hidden, ctx.share)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = weight.new_empty((*grad_losses.shape, weight.size(1))) if needs_hidden else None
        grad_weight = WeightGradient(ctx.parameter) if needs_weight else None
        result, reduced = None, None
        if ctx.divergence is not None:
            ctx.divergence.begin()
        for start in range(0, total.size(0), ctx.chunk):
            of_chunk = slice(start, start + ctx.chunk)
            if not ctx.is_kept:
                assert flat is not None
                _wait_for(gathered)
                exponentials = _logits(flat[of_chunk], weight, ctx.share).float()
                exponentials.sub_(maximum[of_chunk, None]).exp_()
            softmax = exponentials.div_(total[of_chunk, None])
            pull = None if ctx.divergence is None else ctx.divergence.logit_gradients(of_chunk, softmax, grad_beside[1])
            gradients = grad_losses.reshape(-1)[of_chunk]
            grad_logits = _logit_gradients(softmax, elsewhere[of_chunk], column[of_chunk], gradients)
            grad_logits = (grad_logits if pull is None else grad_logits.add_(pull)).to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden.flatten(0, 1)[of_chunk])
                if of_chunk.stop >= total.size(0):  # sent while the last weight gradient is computed
                    result, reduced = reduce_input_gradient(grad_hidden, ctx.share.group, ctx.share.sequence_parallel)
            if grad_weight is not None:
                assert flat is not None
                _wait_for(gathered)
                grad_weight.add(grad_logits, flat[of_chunk])
            del exponentials, softmax, pull, grad_logits  # frees memory for the next chunk's
        _wait_for(reduced)
        return result, None if grad_weight is None else grad_weight.for_autograd(), None, None, None


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)


def _whole_sequence(hidden: Tensor, share: _Share) -> tuple[Tensor, dist.Work | None]:
    """(s / tp or s, b, h) -> (s x b, h), and the handle to wait for before it is read."""
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


def _entropy_of_likeliest(logits: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """(tokens, rows) fp32 of this rank -> the entropy (nats) of the ``count`` likeliest tokens of the whole vocabulary
    with their probabilities renormalised, (tokens,). Ranks exchange ``count`` logits per token, not whole rows."""
    likeliest = logits.topk(min(count, logits.size(1)), dim=1).values
    if group.size() > 1:
        ranks = [torch.empty_like(likeliest) for _ in range(group.size())]
        dist.all_gather(ranks, likeliest, group=group)
        together = torch.cat(ranks, dim=1)
        likeliest = together.topk(min(count, together.size(1)), dim=1).values
    # A row that only pads the vocabulary has the probability 0, and 0 log 0 is 0 here.
    entropy: Tensor = torch.special.entr(likeliest.softmax(dim=1)).sum(dim=1)
    return entropy


def divergence_sums(other: Tensor, mine: Tensor, largest: Tensor, real_rows: int) -> Tensor:
    """This rank's part of the sums in KL(other || mine), (2, tokens): the sums over its rows of exp(r - n)
    ((r - n) - (z - m)) and of exp(r - n).

    ``other`` (tokens, rows) are the other model's logits minus their largest of all ranks, r - n, and become their
    exponentials. ``mine`` are this model's logits z, whose largest are m, (tokens,).
    """
    # Of a row that pads the vocabulary the difference would be minus infinity minus itself, which is undefined.
    difference = (mine[:, :real_rows] - largest[:, None]).neg_().add_(other[:, :real_rows])
    other.exp_()
    return torch.stack([difference.mul_(other[:, :real_rows]).sum(dim=1), other.sum(dim=1)])


def divergence(weighted: Tensor, other_total: Tensor, total: Tensor) -> Tensor:
    """KL(other || mine) in nats from the sums over all rows: the two of ``divergence_sums``, and sum exp(z - m)."""
    return weighted / other_total - other_total.log() + total.log()


class _Divergence:
    """KL(compared || this model) of each token, chunk by chunk, over the vocabulary of all tensor ranks.

    With logits z of this model and r of the other, their largest m and n, t = sum exp(z - m) and u = sum exp(r - n) it
    is sum exp(r - n) ((r - n) - (z - m)) / u - log u + log t, and its gradient by z is exp(z - m) / t - exp(r - n) / u.
    """

    def __init__(self, compared: ComparedModel, share: _Share) -> None:
        self._compared, self._share = compared, share
        self._of_tokens: list[tuple[Tensor, Tensor, Tensor]] = []
        self._flat: Tensor | None = None

    def begin(self) -> None:
        """Starts the chunks of a pass, forward or backward: the other model's hidden states of the whole sequence."""
        self._flat, gathered = _whole_sequence(self._compared.hidden, self._share)
        _wait_for(gathered)

    def _logits(self, of_chunk: slice) -> Tensor:
        assert self._flat is not None
        return _logits(self._flat[of_chunk], self._compared.weight, self._share).float()

    def add(self, of_chunk: slice, logits: Tensor, maximum: Tensor) -> None:
        """Takes in a chunk: this model's logits (tokens, rows), and their maxima over all ranks (tokens,)."""
        other = self._logits(of_chunk)
        largest = other.amax(dim=1)
        _all_reduce(largest, dist.ReduceOp.MAX, self._share.group)
        other.sub_(largest[:, None])
        weighted, total = divergence_sums(other, logits, maximum, self._share.real_rows)
        self._of_tokens.append((largest, weighted, total))

    def values(self, total: Tensor) -> Tensor:
        """Divergences of all tokens; ``total`` (tokens,) is t. Called after the last chunk of the forward pass."""
        self._largest, weighted, other = (torch.cat(parts) for parts in zip(*self._of_tokens, strict=True))
        sums = torch.stack([weighted, other])
        _all_reduce(sums, dist.ReduceOp.SUM, self._share.group)
        weighted, self._total = sums
        self._of_tokens.clear()
        self._flat = None
        return divergence(weighted, self._total, total)

    def logit_gradients(self, of_chunk: slice, softmax: Tensor, gradients: Tensor | None) -> Tensor:
        """(tokens, rows), by this model's logits, whose ``softmax`` is given; ``gradients`` (s, b) are those of the
        divergences."""
        assert gradients is not None
        other = self._logits(of_chunk).sub_(self._largest[of_chunk, None]).exp_().div_(self._total[of_chunk, None])
        return other.neg_().add_(softmax).mul_(gradients.reshape(-1)[of_chunk, None])


class VocabularyHead(ColumnParallelLinear):
    """megatron-core's output matrix, which can give token losses in place of logits.

    It takes over the weight of the one that ``GPTModel`` makes, with the marks set on it; there is none where the
    embedding of the same stage is used.

    forward: (s / tp or s, b, h) -> logits (s, b, rows), or with labels (s, b) losses in nats (s, b), fp32; and None.
    With ``Beside`` the first result is ``TokenValues``, whose losses come first.
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
        beside: Beside | None = None,
    ) -> tuple[Tensor | TokenValues, None]:
        if labels is None:
            assert not runtime_gather_output, "rows are hidden by their number on this rank"
            logits, _ = super().forward(input_, weight, runtime_gather_output)
            hide_padded_rows(logits, self.real_rows)
            return logits, None
        share = _Share(group=self.tp_group, sequence_parallel=self.sequence_parallel, real_rows=self.real_rows)
        found = _TokenLosses.apply(input_, self.weight if weight is None else weight, labels, share, beside)
        return found if beside is None else TokenValues(*found), None
