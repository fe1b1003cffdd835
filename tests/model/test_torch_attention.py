"""Examples in one sequence are as if each were alone. Run: pytest tests/model/test_torch_attention.py"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hft_megatron.data.batches import BatchShare
from hft_megatron.methods.next_token import forward_step
from hft_megatron.model import torch_attention
from hft_megatron.model.torch_attention import packed_attention, packed_seq_params
from tests.support.models import build_from_folder, make_llama
from tests.support.toy_training import TINY, toy_batches, toy_samples

LENGTHS = [5, 1, 40, 17, 40]


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def draw(heads: int, groups: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(sum(LENGTHS), count, 16, requires_grad=True) for count in (heads, groups, groups)]


@pytest.mark.parametrize("groups", [4, 2])
def test_packed_attention_and_its_gradients_equal_those_under_a_block_diagonal_mask(groups: int) -> None:
    tensors = draw(4, groups)
    params = packed_seq_params(starts_of(LENGTHS), torch.device("cpu"))
    out = packed_attention(*tensors, params, 0.3)
    weights = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weights).sum(), tensors)

    example = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = (example[:, None] == example) & torch.ones(sum(LENGTHS), sum(LENGTHS), dtype=torch.bool).tril()
    q, k, v = (tensor.transpose(0, 1).repeat_interleave(4 // tensor.size(1), dim=0) for tensor in tensors)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3).transpose(0, 1)
    assert torch.allclose(out, expected, atol=1e-6)
    for found, other in zip(gradients, torch.autograd.grad((expected * weights).sum(), tensors), strict=True):
        assert torch.allclose(found, other, atol=1e-5)


def run_logits(folder: str) -> dict[str, float | bool]:
    """How far packed logits are from those of each example alone, and what another example's tokens change in them."""
    (model,), shape, _ = build_from_folder(folder, {})
    tokens = torch.randint(3, shape.vocab_size, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))

    def logits(tokens: Tensor, lengths: list[int] | None) -> Tensor:
        packed = None if lengths is None else packed_seq_params(starts_of(lengths), torch.device("cpu"))
        with torch.no_grad():
            return model(tokens, torch.arange(tokens.size(1))[None], None, packed_seq_params=packed)[0]

    packed = logits(tokens, LENGTHS)
    alone = torch.cat([logits(part, None) for part in tokens.split(LENGTHS, dim=1)])
    others = tokens.clone()
    start = sum(LENGTHS[:2])
    inside = slice(start, start + LENGTHS[2])
    others[0, inside] = tokens[0, inside].flip(0)
    changed = logits(others, LENGTHS)
    outside = torch.ones(sum(LENGTHS), dtype=torch.bool)
    outside[inside] = False
    return {
        "far": (packed - alone).abs().max().item(),
        "largest": alone.abs().max().item(),
        "one": (logits(tokens[:, :5], [5]) - logits(tokens[:, :5], None)).abs().max().item(),
        # As one example the same tokens have other positions and see more: the comparison above can fail.
        "unpacked": (logits(tokens, None) - alone).abs().max().item(),
        "others are bit-equal": torch.equal(packed[outside], changed[outside]),
        "it changes": not torch.equal(packed[inside], changed[inside]),
    }


@pytest.mark.parametrize("variant", ["gqa", "mha", "llama3_rope", "tied"])
def test_no_example_sees_another(ranks, tmp_path: Path, variant: str) -> None:
    [found] = ranks(1).run(run_logits, folder=str(make_llama(tmp_path / "model", variant, **TINY)))
    assert found["far"] < 1e-5 * found["largest"]
    assert found["one"] < 1e-5 * found["largest"]
    assert found["unpacked"] > 0.1 * found["largest"]
    assert found["others are bit-equal"]
    assert found["it changes"]


def run_packed_losses(folder: str) -> int:
    """How many drawn packs were looked at; a token's loss in each must be that of its example alone."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    (model,), shape, _ = build_from_folder(folder, {})
    looked_at = 0

    def losses(tokens: Tensor, starts: Tensor | None) -> Tensor:
        packed = None if starts is None else packed_seq_params(starts, torch.device("cpu"))
        labels = tokens.roll(-1, dims=1)
        if starts is not None:  # a segment's last label is its own first token, as it is alone
            labels = torch.cat([part.roll(-1, dims=1) for part in tokens.split(starts.diff().tolist(), dim=1)], dim=1)
        with torch.no_grad():
            return model(tokens, torch.arange(tokens.size(1))[None], None, labels=labels, packed_seq_params=packed)[0]

    @settings(
        max_examples=60,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), seed=st.integers(0, 2**31))
    def check(lengths: list[int], seed: int) -> None:
        nonlocal looked_at
        looked_at += 1
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(3, shape.vocab_size, (1, sum(lengths)), generator=generator)
        alone = torch.cat([losses(part, None) for part in tokens.split(lengths, dim=1)])
        packed = losses(tokens, starts_of(lengths))
        assert torch.allclose(packed, alone, rtol=1e-5, atol=1e-5)
        assert abs(packed.mean() - alone.mean()) <= 1e-5 * alone.mean()

    check()
    return looked_at


def test_the_losses_of_any_pack_are_those_of_its_examples(ranks, tmp_path: Path) -> None:
    pytest.importorskip("hypothesis", reason="hypothesis is not installed: make install brings it")
    [looked_at] = ranks(1).run(run_packed_losses, folder=str(make_llama(tmp_path / "model", "gqa", **TINY)))
    assert looked_at >= 60


def run_rotated(folder: str, restart: bool) -> dict[str, bool]:
    """Whether queries and keys behind the rotation are those of each example alone, in the packed sequence.

    Logits cannot tell: rotary angles are relative, so an example as a whole may stand anywhere.
    """
    (model,), shape, _ = build_from_folder(folder, {})
    tokens = torch.randint(3, shape.vocab_size, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    first = next(module for module in model.modules() if isinstance(module, torch_attention.TorchAttention))
    seen: list[list[Tensor]] = []
    first.register_forward_pre_hook(lambda module, inputs: seen.append([t.flatten(0, -3) for t in inputs[:2]]))
    params = packed_seq_params(starts_of(LENGTHS), torch.device("cpu"))
    if not restart:
        params.positions = torch.arange(sum(LENGTHS))
    with torch.no_grad():
        model(tokens, torch.arange(tokens.size(1))[None], None, packed_seq_params=params)
        for part in tokens.split(LENGTHS, dim=1):
            model(part, torch.arange(part.size(1))[None], None)
    packed, alone = seen[0], [torch.cat(tensors) for tensors in zip(*seen[1:], strict=True)]
    return {
        name: torch.allclose(found, other, atol=1e-6)
        for name, found, other in zip(("query", "key"), packed, alone, strict=True)
    }


@pytest.mark.parametrize("variant", ["gqa", "llama3_rope"])
@pytest.mark.parametrize("restart", [True, False])
def test_positions_restart_in_every_segment(ranks, tmp_path: Path, variant: str, restart: bool) -> None:
    folder = str(make_llama(tmp_path / "model", variant, **TINY))
    [same] = ranks(1).run(run_rotated, folder=folder, restart=restart)
    # With positions of the whole sequence they don't, which this must be able to see.
    assert same == {"query": restart, "key": restart}


def run_gradients(folder: str, size: int) -> dict[str, Any]:
    """The largest distance of any gradient of one packed step from that of the same examples in rows of their own."""
    share = BatchShare(
        micro_batch_size=size, global_batch_size=8, data_parallel_rank=0, data_parallel_size=1, length_multiple=1
    )
    examples = [(index,) for position in range(8) for index in toy_samples(packed=True).sample(position)]
    rows = BatchShare(
        micro_batch_size=len(examples),
        global_batch_size=len(examples),
        data_parallel_rank=0,
        data_parallel_size=1,
        length_multiple=1,
    )
    steps = toy_batches(share, packed=True).step(0), toy_batches(rows).batches.assemble(examples, packed=False)
    losses, gradients = [], []
    (model,), _, _ = build_from_folder(folder, {})
    for step in steps:
        model.zero_grad()
        total = 0.0
        trained = sum(float(micro_batch["loss_mask"].sum()) for micro_batch in step.micro_batches)
        for micro_batch in step.micro_batches:
            output, loss_function = forward_step(iter([micro_batch]), model)
            loss, _, _ = loss_function(output)
            (loss / trained).backward()
            total += float(loss) / trained
        losses.append(total)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    packed, alone = gradients
    far = {name: (packed[name] - alone[name]).norm().item() / alone[name].norm().item() for name in alone}
    return {"losses": losses, "far": far}


@pytest.mark.parametrize("size", [1, 4])
def test_a_packed_step_has_the_loss_and_every_gradient_of_its_examples_alone(ranks, tmp_path: Path, size: int) -> None:
    [found] = ranks(1).run(run_gradients, folder=str(make_llama(tmp_path / "model", "gqa", **TINY)), size=size)
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-6)
    assert max(found["far"].values()) < 1e-5


def test_segments_are_known_by_lengths_and_positions() -> None:
    params = packed_seq_params(starts_of(LENGTHS), torch.device("cpu"))
    assert (params.qkv_format, params.max_seqlen_q, params.max_seqlen_kv) == ("thd", 40, 40)
    assert params.lengths == tuple(LENGTHS)
    assert params.positions.tolist() == [position for length in LENGTHS for position in range(length)]


def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("it has no window, and no scale")


def of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert query.shape == key.shape == value.shape
    return stand_in(query, key, value, [cu_seq_q, cu_seq_k], [max_q, max_k], scale, window_size)


def of_torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa == (query.shape != key.shape)
    return stand_in(query, key, value, [cu_seq_q, cu_seq_k], [max_q, max_k], scale, window_size)


def stand_in(query, key, value, starts, longest, scale, window_size):
    assert all(tensor.tolist() == starts_of(LENGTHS).tolist() for tensor in starts)
    assert (longest, window_size) == ([40, 40], (-1, 0))
    params = packed_seq_params(starts_of(LENGTHS), torch.device("cpu"))
    return packed_attention(query, key, value, params, scale)


def test_the_kernel_of_a_torch_is_used_from_that_on_which_it_can_be_causal() -> None:
    found = [torch_attention.has_causal_window(it) for it in (of_torch_2_10, of_torch_2_11, of_torch_2_12)]
    assert found == [False, True, True]


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("function", [of_torch_2_11, of_torch_2_12])
def test_the_kernel_gets_groups_only_where_it_knows_them(function: Any, groups: int) -> None:
    tensors = draw(4, groups)
    params = packed_seq_params(starts_of(LENGTHS), torch.device("cpu"))
    found = torch_attention.by_varlen_kernel(function, *tensors, params, 0.3)
    assert torch.allclose(found, packed_attention(*tensors, params, 0.3), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [4, 2])
def test_the_variable_length_kernel_equals_one_example_at_a_time(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = torch_attention.varlen_kernel()
    if not torch.cuda.is_available() or kernel is None:
        pytest.skip("needs CUDA, and a torch whose varlen_attn knows windows and groups")
    tensors = [tensor.detach().cuda().bfloat16().requires_grad_() for tensor in draw(4, groups)]
    params = packed_seq_params(starts_of(LENGTHS), torch.device("cuda"))
    found, gradients = [], []
    for function in (kernel, None):
        monkeypatch.setattr(torch_attention, "varlen_kernel", lambda function=function: function)
        out = packed_attention(*tensors, params, None)
        found.append(out)
        gradients.append(torch.autograd.grad(out.float().square().sum(), tensors))
    assert torch.allclose(*found, atol=2e-2)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=5e-2)
