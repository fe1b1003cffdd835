"""The head's output for hidden states when nothing is trained: logits, token scores, and divergences of two models.

The vocabulary is cut over tensor ranks as in training, and logits are in memory for a chunk of tokens at a time.
All functions are collective over tensor ranks of the last stage, and give every one of them the same.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from hft_megatron.config.derived import tokens_of_a_chunk
from hft_megatron.model.head import divergence, divergence_sums, hide_padded_rows
from hft_megatron.model.linear import gather_sequence
from hft_megatron.model.llama import LlamaModel


class Readout:
    """The head of a model's last stage."""

    def __init__(self, chunk: LlamaModel) -> None:
        head = chunk.output_layer
        self._weight: Tensor = chunk.head_weight()
        self._group: dist.ProcessGroup = head.tp_group
        self._splits_sequences = head.sequence_parallel
        self._real_rows = head.real_rows
        self._vocab_size = chunk.shape.vocab_size

    def whole(self, hidden: Tensor) -> Tensor:
        """(t / tp or t, b, h), a last stage's output -> (t x b, h)."""
        if self._splits_sequences:
            hidden, gathered = gather_sequence(hidden, self._group)
            gathered.wait()
        return hidden.flatten(0, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, h) -> (n, vocabulary), fp32."""
        mine = self._of_rank(hidden)
        if self._group.size() == 1:
            return mine[:, : self._vocab_size]
        parts = [torch.empty_like(mine) for _ in range(self._group.size())]
        dist.all_gather(parts, mine, group=self._group)
        return torch.cat(parts, dim=1)[:, : self._vocab_size]

    def likeliest(self, hidden: Tensor) -> Tensor:
        """(n, h) -> the token with the largest logit, the first of several, (n,) int64; -1 where that logit is not
        finite."""
        found = [torch.empty(0, dtype=torch.int64, device=hidden.device)]
        for _, logits in self._chunks(hidden):
            largest, column = logits.max(dim=1)
            value, place = self._best_of_ranks(largest, column + self._group.rank() * logits.size(1))
            found.append(place.where(value.isfinite(), -1))
        return torch.cat(found)

    def token_scores(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (nats, fp32) of ``targets`` (n,), and whether greedy generation would choose each of them.

        Of several largest logits it chooses the first, as ``argmax`` over the whole vocabulary does.
        """
        scores, greedy = [hidden.new_empty(0, dtype=torch.float32)], [targets.new_empty(0, dtype=torch.bool)]
        for chunk, logits in self._chunks(hidden):
            wanted, first_row = targets[chunk], self._group.rank() * logits.size(1)
            largest, column = logits.max(dim=1)
            best, best_column = self._best_of_ranks(largest, column + first_row)
            is_here = (wanted >= first_row) & (wanted < first_row + logits.size(1))
            own = logits.gather(1, (wanted - first_row).where(is_here, 0)[:, None]).squeeze(1) - best
            sums = torch.stack([own.where(is_here, 0.0), (logits - best[:, None]).exp_().sum(dim=1)])
            if self._group.size() > 1:
                dist.all_reduce(sums, group=self._group)
            scores.append(sums[0] - sums[1].log())
            greedy.append(best_column == wanted)
        return torch.cat(scores), torch.cat(greedy)

    def _best_of_ranks(self, largest: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """The largest of all ranks' largest logits (n,), and its place in the whole vocabulary."""
        if self._group.size() == 1:
            return largest, column
        mine = torch.stack([largest.double(), column.double()])
        ranks = [torch.empty_like(mine) for _ in range(self._group.size())]
        dist.all_gather(ranks, mine, group=self._group)
        values, places = torch.stack(ranks).unbind(dim=1)
        best = values.argmax(dim=0, keepdim=True)
        return values.gather(0, best).squeeze(0).to(largest.dtype), places.gather(0, best).squeeze(0).long()

    def divergences(self, hidden: Tensor, other: "Readout", of_other: Tensor) -> Tensor:
        """KL(this || other) and KL(other || this) in nats, (2, n) fp32, of hidden states (n, h) of two models with one
        vocabulary: sum over the vocabulary of p (log p - log q)."""
        found = [hidden.new_empty((2, 0), dtype=torch.float32)]
        for chunk, mine in self._chunks(hidden):
            theirs = other._of_rank(of_other[chunk])
            largest, of_theirs = self._largest(mine), self._largest(theirs)
            # The first argument is overwritten, so ``theirs`` is the second one before it is the first.
            sums = [divergence_sums(mine - largest[:, None], theirs, of_theirs, self._real_rows)]
            sums.append(divergence_sums(theirs.sub_(of_theirs[:, None]), mine, largest, self._real_rows))
            totals = torch.cat(sums)
            if self._group.size() > 1:
                dist.all_reduce(totals, group=self._group)
            weighted, total, of_their_weighted, of_their_total = totals
            both = [divergence(weighted, total, of_their_total), divergence(of_their_weighted, of_their_total, total)]
            found.append(torch.stack(both))
        return torch.cat(found, dim=1)

    def _largest(self, logits: Tensor) -> Tensor:
        """(n, rows) of this rank -> the largest over the whole vocabulary, (n,)."""
        largest = logits.amax(dim=1)
        if self._group.size() > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        return largest

    def _chunks(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        size = tokens_of_a_chunk(hidden.size(0), self._weight.size(0))
        for start in range(0, hidden.size(0), max(1, size)):
            chunk = slice(start, start + size)
            yield chunk, self._of_rank(hidden[chunk])

    def _of_rank(self, hidden: Tensor) -> Tensor:
        """(n, h) -> this rank's rows of the vocabulary, (n, rows) fp32."""
        logits = hidden.mm(self._weight.t())
        hide_padded_rows(logits, self._real_rows)
        return logits.float()
