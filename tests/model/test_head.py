"""Losses and gradients of the chunked head against plain cross-entropy, and the work and memory of it, counted."""

import itertools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
from torch import Tensor

from hft_megatron.config import derived
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.model import head
from hft_megatron.model.head import VocabularyHead
from hft_megatron.parallel.groups import Placement, start_groups
from tests.support.live_bytes import LiveBytes
from tests.support.models import LAYOUTS
from tests.support.work_account import Account

WORLD_SIZE = {"tp1": 1, "tp2": 2, "tp2_sp": 2}
SEQUENCE, BATCH, HIDDEN = 6, 2, 10
TOKENS, ROWS = SEQUENCE * BATCH, 24
CHUNK = 5
"""Tokens of a chunk where there are several: the last one is smaller."""
REAL_ROWS = [24, 21, 11]
"""Of the vocabulary: none padded, some of the last rank's padded, and all of the last rank's."""


def in_chunks(tokens: int, rows: int) -> Any:
    """As if memory held the logits of so many tokens, over so many rows, and no more."""
    return patch.multiple(derived, WHOLE_BYTES=4 * tokens * rows, CHUNK_BYTES=4 * tokens * rows)


def make_head(placement: Placement, sequence_parallel: bool, rows: int, real_rows: int, hidden: int) -> VocabularyHead:
    size = placement.tensor_size
    config = ModelParallelConfig(
        tensor_model_parallel_size=size, sequence_parallel=sequence_parallel, perform_initialization=False
    )
    made = ColumnParallelLinear(
        hidden,
        rows,
        config=config,
        init_method=torch.nn.init.zeros_,
        bias=False,
        gather_output=False,
        tp_group=placement.groups.tp,
    )
    local = rows // size
    mine = max(0, min(local, real_rows - placement.tensor_rank * local))
    return VocabularyHead(made, config, real_rows=mine)


def run_case(placement: Placement, sequence_parallel: bool, real: int, trains: bool, input_trains: bool) -> dict:
    rank, size = placement.tensor_rank, placement.tensor_size
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(*shape, HIDDEN, generator=generator) for shape in ((SEQUENCE, BATCH), (ROWS,)))
    hidden *= 0.3  # losses of a few nats, as in a run: an fp32 loss of 16 is only known to 1e-6
    labels = torch.randint(0, real, (SEQUENCE, BATCH), generator=generator)
    upstream = torch.rand(SEQUENCE, BATCH, generator=generator)
    exact_hidden, exact_weight = (t.double().requires_grad_() for t in (hidden, weight))
    exact = F.cross_entropy((exact_hidden @ exact_weight[:real].t()).flatten(0, 1), labels.flatten(), reduction="none")
    exact.backward(upstream.double().flatten())

    output = make_head(placement, sequence_parallel, ROWS, real, HIDDEN)
    output.weight.data.copy_(weight.chunk(size)[rank])
    output.weight.requires_grad = trains
    mine = (lambda whole: whole.chunk(size)[rank]) if sequence_parallel else (lambda whole: whole)
    local = mine(hidden).clone().requires_grad_(input_trains)
    account = Account()
    with account.watching():
        losses, _ = output(local, labels=labels)
        forward, kept = account.take(), account.kept_besides(output.weight)
        if losses.requires_grad:
            losses.backward(upstream)
    far = [(losses.flatten() - exact).abs().max()]
    if trains:
        far.append((output.weight.grad - exact_weight.grad.chunk(size)[rank]).abs().max())
    if input_trains:
        far.append((local.grad - mine(exact_hidden.grad)).abs().max())
    return {
        "far": max(float(distance) for distance in far),
        "types": [str(losses.dtype), output.weight.grad is not None, local.grad is not None],
        "forward": forward,
        "backward": account.take(),
        "kept": [shape for shape in kept if len(shape) > 1],
    }


def run_every_case(layout: dict[str, Any], chunk: int) -> list[dict[str, Any]]:
    parallel = ParallelConfig(**layout)
    placement = start_groups(parallel, num_layers=2, seed=1)
    with in_chunks(chunk, ROWS // placement.tensor_size):
        return [run_case(placement, parallel.sequence_parallel, *case) for case in CASES]


CASES = list(itertools.product(REAL_ROWS, (True, False), (True, False)))


@pytest.mark.parametrize("layout", WORLD_SIZE)
@pytest.mark.parametrize("chunk", [TOKENS, CHUNK])
def test_losses_and_gradients_are_those_of_plain_cross_entropy_in_one_chunk_and_in_three(ranks, layout, chunk):
    size = WORLD_SIZE[layout]
    gathers = layout == "tp2_sp"
    is_whole = chunk == TOKENS
    chunks = 1 if is_whole else 3
    shard = [SEQUENCE // 2 if gathers else SEQUENCE, BATCH, HIDDEN]
    gathered = ["all_gather_into_tensor", "all_gather_into_tensor waited for"] * gathers
    for rows in ranks(size).run(run_every_case, layout=LAYOUTS[layout], chunk=chunk):
        for (real, trains, input_trains), row in zip(CASES, rows, strict=True):
            case = real, trains, input_trains, row
            assert row["far"] <= 1e-6, case
            assert row["types"] == ["torch.float32", trains, input_trains], case
            reductions = 0 if size == 1 else 1
            assert row["forward"] == [
                *gathered,
                *["product", *["all_reduce"] * reductions] * chunks,
                *["all_reduce"] * reductions,
            ], case
            kept = [shard] * (trains or not is_whole) + [[TOKENS, ROWS // size]] * is_whole
            if trains or input_trains:
                assert row["kept"] == kept, case
            reduction = "reduce_scatter_tensor" if gathers else "all_reduce"
            reduces = input_trains and size > 1
            waits = gathered[1:]
            each = ([*waits, "product"]) * (not is_whole) + ["product"] * input_trains
            each_weight = ([*waits, "product"]) * trains
            expected = gathered[:1] * (trains or not is_whole) + (each + each_weight) * (chunks - 1)
            expected += each + [reduction] * reduces + each_weight + [f"{reduction} waited for"] * reduces
            assert row["backward"] == (expected if trains or input_trains else []), case


def run_beside(layout: dict[str, Any], chunk: int, real: int, likeliest: int) -> dict[str, float]:
    """How far entropies, divergences and the gradients of losses and divergences together are from plain ones."""
    parallel = ParallelConfig(**layout)
    placement = start_groups(parallel, num_layers=2, seed=1)
    rank, size = placement.tensor_rank, placement.tensor_size
    generator = torch.Generator().manual_seed(5)
    hidden, other = (0.3 * torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator) for _ in range(2))
    weight, other_weight = (torch.randn(ROWS, HIDDEN, generator=generator) for _ in range(2))
    labels = torch.randint(0, real, (SEQUENCE, BATCH), generator=generator)
    of_losses, of_divergences = (torch.rand(SEQUENCE, BATCH, generator=generator) for _ in range(2))
    exact_hidden, exact_weight = (t.double().requires_grad_() for t in (hidden, weight))
    logits = exact_hidden @ exact_weight[:real].t()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    compared = (other.double() @ other_weight[:real].double().t()).log_softmax(dim=-1)
    divergences = F.kl_div(logits.log_softmax(dim=-1), compared, log_target=True, reduction="none").sum(dim=-1)
    top = logits.topk(likeliest, dim=-1).values.softmax(dim=-1)
    ((losses * of_losses).sum() + (divergences * of_divergences).sum()).backward()

    output = make_head(placement, parallel.sequence_parallel, ROWS, real, HIDDEN)
    output.weight.data.copy_(weight.chunk(size)[rank])
    mine = (lambda whole: whole.chunk(size)[rank]) if parallel.sequence_parallel else (lambda whole: whole)
    local = mine(hidden).clone().requires_grad_()
    model = head.ComparedModel(hidden=mine(other), weight=other_weight.chunk(size)[rank])
    with in_chunks(chunk, ROWS // size):
        plain, _ = output(local, labels=labels)
        values, _ = output(local, labels=labels, beside=head.Beside(entropy_of=likeliest, compared=model))
        same = head.ComparedModel(hidden=local.detach(), weight=output.weight.detach())
        itself = output(local, labels=labels, beside=head.Beside(compared=same))[0].divergences
        ((values.losses * of_losses).sum() + (values.divergences * of_divergences).sum()).backward()
    assert not values.entropies.requires_grad
    return {
        "losses, from those without anything beside them": float((values.losses - plain).abs().max()),
        "entropies": float((values.entropies - torch.special.entr(top).sum(dim=-1)).abs().max()),
        "divergences": float((values.divergences - divergences).abs().max()),
        "divergence from itself": float(itself.abs().max()),
        "gradient of the input": float((local.grad - mine(exact_hidden.grad)).abs().max()),
        "gradient of the weight": float((output.weight.grad - exact_weight.grad.chunk(size)[rank]).abs().max()),
    }


@pytest.mark.parametrize("layout", WORLD_SIZE)
@pytest.mark.parametrize("real", REAL_ROWS)
def test_entropies_and_divergences_are_those_of_whole_distributions(ranks, layout, real):
    for chunk, likeliest in ((TOKENS, 5), (CHUNK, 11)):
        case = {"layout": LAYOUTS[layout], "chunk": chunk, "real": real, "likeliest": likeliest}
        for far in ranks(WORLD_SIZE[layout]).run(run_beside, **case):
            assert {name: distance for name, distance in far.items() if not distance <= 2e-6} == {}
            assert far["losses, from those without anything beside them"] == 0
            assert far["divergence from itself"] == 0


def run_bits(chunk: int) -> list[bool]:
    """Whether losses, both gradients and logits are megatron-core's, of its own head and cross-entropy."""
    placement = start_groups(ParallelConfig(), num_layers=2, seed=1)
    generator = torch.Generator().manual_seed(5)
    output = make_head(placement, False, ROWS, ROWS, HIDDEN)
    output.weight.data.normal_(generator=generator)
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator).requires_grad_()
    labels = torch.randint(0, ROWS, (SEQUENCE, BATCH), generator=generator)
    upstream = torch.rand(SEQUENCE, BATCH, generator=generator)
    logits, _ = ColumnParallelLinear.forward(output, hidden)
    expected = vocab_parallel_cross_entropy(logits.clone(), labels)
    gradients = torch.autograd.grad(expected, (hidden, output.weight), upstream)
    with in_chunks(chunk, ROWS):
        losses, _ = output(hidden, labels=labels)
        found = torch.autograd.grad(losses, (hidden, output.weight), upstream)
    return [
        torch.equal(losses, expected),
        *(torch.equal(*pair) for pair in zip(found, gradients, strict=True)),
        torch.equal(output(hidden)[0], logits),
    ]


def test_one_chunk_has_the_bits_of_the_engines_own_head_and_loss(ranks):
    assert ranks(1).run(run_bits, chunk=TOKENS) == [[True] * 4]


def peaks(run: Callable[[Tensor, Tensor, Tensor], Tensor], rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """Peak bytes of a forward pass without gradients and of a whole step, at 8,192 tokens and a hidden size of 256."""
    hidden = torch.empty(8192, 1, 256, device="meta", dtype=dtype)
    weight = torch.nn.Parameter(torch.empty(rows, 256, device="meta", dtype=dtype))
    labels = torch.empty(8192, 1, dtype=torch.int64, device="meta")
    with torch.no_grad(), LiveBytes() as forward:
        run(hidden, weight, labels)
    hidden.requires_grad_()
    with LiveBytes() as step:
        run(hidden, weight, labels).sum().backward()
    return forward.peak, step.peak


def run_peaks(rows: int, dtype: str) -> list[tuple[int, int]]:
    placement = start_groups(ParallelConfig(), num_layers=2, seed=1)
    output = make_head(placement, False, 64, 64, 256)
    share = head._Share(group=placement.groups.tp, sequence_parallel=False, real_rows=rows)

    def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = output._forward_impl(
            hidden,
            weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=False,
            sequence_parallel=False,
            tp_group=None,
        )
        with patch.object(dist, "all_reduce", lambda *args, **kwargs: None):
            return vocab_parallel_cross_entropy(logits, labels)

    chunked: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda *tensors: head._TokenLosses.apply(*tensors, share)  # noqa: E731
    return [peaks(run, rows, getattr(torch, dtype)) for run in (whole, chunked)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_128k_rows_take_a_quarter_of_the_engines_memory_and_40_percent_with_gradients(ranks, dtype):
    [[(whole, whole_step), (forward, step)]] = ranks(1).run(run_peaks, rows=131_072, dtype=dtype)
    assert whole > 4 * 2**30
    assert forward <= 0.25 * whole, forward / whole
    assert step <= 0.40 * whole_step, step / whole_step


def test_32k_rows_are_one_chunk_and_128k_rows_several():
    assert derived.tokens_of_a_chunk(8192, 32_768) == 8192
    assert derived.tokens_of_a_chunk(8192, 131_072) == 1024
    assert derived.tokens_of_a_chunk(3, 2**30) == 1
