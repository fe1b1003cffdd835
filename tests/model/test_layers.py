"""What a layer computes besides its products: values against plain PyTorch, and the operators of it, counted."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hft_megatron.model.layers import _SwiGLU, rms_norm, rotate
from hft_megatron.model.torch_attention import packed_seq_params
from tests.support.models import build_from_folder, make_llama
from tests.support.operator_calls import OperatorCalls
from tests.support.work_account import Account

BF16 = torch.bfloat16


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_swiglu_has_the_bits_of_plain_operators_and_keeps_gate_and_up_alone(dtype: torch.dtype) -> None:
    gate, up, upstream = (draw(6, 2, 10, dtype=dtype, seed=seed) for seed in range(3))
    expected = F.silu(gate) * up
    account = Account()
    with account.watching():
        found = _SwiGLU.apply(gate, up)
    assert [tensor.data_ptr() for tensor in account.kept] == [gate.data_ptr(), up.data_ptr()]
    assert torch.equal(found, expected)
    pair = (torch.autograd.grad(output, (gate, up), upstream) for output in (found, expected))
    assert all(torch.equal(*gradients) for gradients in zip(*pair, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_rotation_has_the_bits_of_hugging_faces_and_keeps_the_table_alone(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, upstream = (draw(6, 2, 3, 8, dtype=dtype, seed=seed) for seed in range(2))
    angles = torch.outer(torch.arange(6.0), 10000.0 ** -(torch.arange(0, 8, 2) / 8)).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    theirs = heads.permute(1, 2, 0, 3)
    expected = apply_rotary_pos_emb(theirs, theirs, cos[None], sin[None])[0].permute(2, 0, 1, 3)
    signed = torch.cat([-sin[:, :4], sin[:, 4:]], dim=1)
    table = torch.stack([cos, signed])[:, :, None, None]
    account = Account()
    with account.watching():
        found = rotate(heads, table)
    assert [tensor.data_ptr() for tensor in account.kept] == [table.data_ptr()]
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(output, heads, upstream)[0] for output in (found, expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (BF16, 2**-7)])
def test_the_norm_in_one_kernel_differs_by_one_rounding(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, upstream = draw(6, 2, 64, dtype=dtype), draw(64, dtype=dtype, seed=1), draw(6, 2, 64, dtype=dtype)
    outputs = [rms_norm(hidden, weight, 1e-5, in_one_kernel=flag) for flag in (True, False)]
    assert torch.allclose(*outputs, rtol=tolerance, atol=tolerance)
    found, expected = (torch.autograd.grad(output, (hidden, weight), upstream) for output in outputs)
    for gradients in zip(found, expected, strict=True):
        assert (gradients[0] - gradients[1]).norm() <= 2 * tolerance * gradients[1].norm()


def test_the_norm_has_hugging_faces_bits_on_cpu() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    hidden, weight = draw(6, 2, 64, dtype=BF16), draw(64, dtype=BF16, seed=1)
    theirs = LlamaRMSNorm(64, eps=1e-5).to(BF16)
    theirs.weight.data.copy_(weight)
    assert torch.equal(rms_norm(hidden, weight, 1e-5, in_one_kernel=False), theirs(hidden))


def run_counting(folder: str, packed: bool, half: bool) -> list[Any]:
    """Operators of a forward and of a backward pass, and what the host read back in both."""
    (model,), _, _ = build_from_folder(folder, {}, BF16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not half or not any(part in name for part in ("q_proj", "fc1.up", "linear_proj"))
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    tokens = torch.randint(3, 96, (1, 48), generator=torch.Generator().manual_seed(0))
    segments = packed_seq_params(torch.tensor([0, 10, 30, 48], dtype=torch.int32), torch.device("cpu"))
    with OperatorCalls() as forward:
        output = model(tokens, tokens, None, labels=tokens, packed_seq_params=segments if packed else None)
    loss = output.sum()
    with OperatorCalls() as backward:
        loss.backward()
    return [forward.calls.total(), backward.calls.total(), forward.reads + backward.reads]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Models of one and of three layers."""
    folder = tmp_path_factory.mktemp("layers")
    return [str(make_llama(folder / str(layers), num_hidden_layers=layers)) for layers in (1, 3)]


@pytest.mark.parametrize(
    ("packed", "half", "most"),
    [(False, False, [36, 68]), (False, True, [36, 62]), (True, False, [39, 73])],
)
def test_a_layer_takes_no_more_operators_than_it_did_and_the_host_reads_nothing_back(
    ranks, folders: list[str], packed: bool, half: bool, most: list[int]
) -> None:
    pool = ranks(1)
    [few], [many] = (pool.run(run_counting, folder=folder, packed=packed, half=half) for folder in folders)
    # On CPU both norms take 16 of the first number; one kernel each on CUDA.
    per_layer = [(more - less) / 2 for less, more in zip(few[:2], many[:2], strict=True)]
    assert all(count <= limit for count, limit in zip(per_layer, most, strict=True)), per_layer
    assert many[2] == {}


def test_the_count_of_host_reads_sees_them() -> None:
    tensor = torch.ones(())
    with OperatorCalls() as seen:
        tensor.item()
        tensor.tolist()
        if tensor == 1:
            int(tensor)
        torch.equal(tensor, tensor)
        torch.is_nonzero(tensor)
    # The last by the operator that torch calls for it.
    assert seen.reads == {"item": 1, "tolist": 1, "__bool__": 1, "__int__": 1, "equal": 1, "_local_scalar_dense": 1}
