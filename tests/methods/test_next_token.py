"""The next-token loss: per trained token of the global batch, whatever the micro-batches and ranks."""

from types import SimpleNamespace

import pytest
import torch

from hft_megatron.methods.next_token import LOSS_AND_TOKENS, forward_step, masked_loss, mean_loss


def test_masked_loss_is_the_sum_over_trained_tokens_and_their_number():
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    mask = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    loss, tokens, report = masked_loss(losses, loss_mask=mask)
    loss.backward()
    assert (loss.item(), tokens.item(), tokens.dtype) == (14.0, 3, torch.int)
    assert report[LOSS_AND_TOKENS].tolist() == [14.0, 3.0]
    assert not report[LOSS_AND_TOKENS].requires_grad
    assert torch.equal(losses.grad, mask)


def test_bf16_token_losses_are_summed_in_fp32():
    losses = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)  # bf16 counts only to 256
    assert masked_loss(losses, loss_mask=torch.ones(1, 4096))[0].item() == 4096


class _Chunk(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, tokens, positions, attention_mask, labels, packed_seq_params):
        self.seen = SimpleNamespace(positions=positions, attention_mask=attention_mask, labels=labels)
        self.seen.packed = packed_seq_params
        return (tokens + labels).float()


def test_a_forward_step_takes_one_micro_batch_and_counts_positions_from_zero_in_every_row():
    tokens = torch.tensor([[5, 6, 7], [8, 9, 0]])
    batch = {"tokens": tokens, "labels": tokens + 1, "loss_mask": torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])}
    batches, chunk = iter([batch, {}]), _Chunk()
    output, loss_function = forward_step(batches, chunk)
    assert chunk.seen.positions.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert chunk.seen.attention_mask is None
    assert chunk.seen.packed is None
    assert torch.equal(chunk.seen.labels, tokens + 1)
    assert loss_function(output)[0].item() == (5 + 6) + (9 + 10)
    assert next(batches) == {}


def test_a_packed_sequence_brings_its_segments():
    tokens = torch.tensor([[5, 6, 7, 8, 9, 0]])
    cu_seqlens = torch.tensor([0, 2, 5, 6], dtype=torch.int32)
    batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(1, 6), "cu_seqlens": cu_seqlens}
    chunk = _Chunk()
    forward_step(iter([batch]), chunk)
    assert torch.equal(chunk.seen.packed.cu_seqlens_q, cu_seqlens)
    assert chunk.seen.packed.max_seqlen_q == 3


def run_mean_loss(reports: list[list[list[float]]]) -> float:
    mine = reports[torch.distributed.get_rank()]
    rows = [{LOSS_AND_TOKENS: torch.tensor(row)} for row in mine]
    return mean_loss(rows, torch.distributed.group.WORLD, torch.device("cpu"))


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([[[2.0, 1.0], [10.0, 4.0]], [[30.0, 5.0]]], 4.2),  # a mean of means would be 4.125 or 3.5
        ([[[6.0, 3.0]], []], 2.0),
        ([[[0.0, 0.0], [6.0, 3.0]], [[0.0, 0.0]]], 2.0),
    ],
)
def test_the_mean_loss_weighs_every_trained_token_of_all_ranks_alike(ranks, reports, expected):
    assert ranks(2).run(run_mean_loss, reports=reports) == [pytest.approx(expected)] * 2
