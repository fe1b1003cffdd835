"""Which way a weight gradient is added, and what autograd gets for it."""

from typing import Any

import pytest
import torch

from hft_megatron.model.linear import (
    WeightGradient,
    add_fp32_product,
    add_half_to_fp32,
    add_in_one_dtype,
    add_rounded_product,
    addition,
)

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.mark.parametrize(
    ("total", "product", "device", "release", "expected"),
    [
        (FP32, BF16, "cuda", (2, 11), add_half_to_fp32),
        (FP32, FP16, "cuda", (2, 13), add_half_to_fp32),
        (FP32, BF16, "cuda", (2, 10), add_fp32_product),
        (FP32, BF16, "cuda", (3, 0), add_half_to_fp32),
        (FP32, BF16, "cpu", (2, 11), add_rounded_product),
        (FP32, FP32, "cuda", (2, 11), add_in_one_dtype),
        (BF16, BF16, "cuda", (2, 11), add_in_one_dtype),
        (FP64, FP64, "cpu", (2, 11), add_in_one_dtype),
    ],
)
def test_half_precision_is_added_to_fp32_without_rounding_where_torch_has_it(total, product, device, release, expected):
    assert addition(total, product, device, release) is expected


def test_a_sum_of_bf16_products_is_rounded_once():
    weight = torch.nn.Parameter(torch.zeros(1, 1, dtype=BF16))
    gradient = WeightGradient(weight)
    for _ in range(512):  # bf16 counts only to 256
        gradient.add(torch.ones(1, 1, dtype=BF16), torch.ones(1, 1, dtype=BF16))
    found = gradient.for_autograd()
    assert (found.dtype, found.item()) == (BF16, 512)


def test_main_grad_gets_the_sum_of_products_and_of_rows() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(3, 2), False  # type: ignore[attr-defined]
    gradient = WeightGradient(weight)
    gradient.add(torch.ones(4, 3), torch.ones(4, 2))
    assert torch.equal(weight.main_grad, torch.full((3, 2), 5.0))  # type: ignore[attr-defined]
    gradient.add_rows(torch.tensor([2, 0, 2]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=FP64))
    assert weight.main_grad.tolist() == [[8.0, 9.0], [5.0, 5.0], [11.0, 13.0]]  # type: ignore[attr-defined]
    assert not weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert gradient.for_autograd().shape == weight.shape
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]


def test_the_first_product_of_a_step_and_the_first_rows_are_written_over_what_was_there() -> None:
    weight: Any = torch.nn.Parameter(torch.zeros(3, 2))
    weight.main_grad, weight.unwritten_gradients = torch.full((3, 2), float("nan")), {weight}
    for expected in (4.0, 8.0):
        WeightGradient(weight).add(torch.ones(4, 3), torch.ones(4, 2))
        assert torch.equal(weight.main_grad, torch.full((3, 2), expected))
    weight.main_grad.fill_(float("nan"))
    weight.unwritten_gradients.add(weight)
    for expected in (1.0, 2.0):
        WeightGradient(weight).add_rows(torch.tensor([1]), torch.ones(1, 2))
        assert weight.main_grad.tolist() == [[0.0, 0.0], [expected, expected], [0.0, 0.0]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_on_a_gpu_sixteen_products_add_up_as_in_fp32(dtype: torch.dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=dtype, device="cuda"))
    weight.main_grad = torch.full((48, 32), float("nan"), device="cuda")
    weight.unwritten_gradients = {weight}
    exact = torch.zeros(48, 32, device="cuda", dtype=FP64)
    for _ in range(16):
        left, right = (torch.randn(64, n, device="cuda", generator=generator).to(dtype) for n in (48, 32))
        WeightGradient(weight).add(left, right)
        exact += left.double().t() @ right.double()
    assert (weight.main_grad - exact).norm() <= 1e-5 * exact.norm()
