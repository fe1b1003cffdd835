"""Weight gradients of matrix products, added to where ``DistributedDataParallel`` collects them.

With weights in half precision the gradients are collected in fp32, and on CUDA no product is rounded on its way there.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

AddProduct = Callable[[Tensor, Tensor, Tensor], object]
"""``add(total, left, right)``: total (m, n) += left (m, k) @ right (k, n)."""
HALF = (torch.bfloat16, torch.float16)
TORCH_RELEASE: tuple[int, int] = tuple(int(part) for part in torch.__version__.split(".")[:2])  # type: ignore[assignment]


def add_in_one_dtype(total: Tensor, left: Tensor, right: Tensor) -> object:
    """One kernel, where all three have one dtype."""
    return total.addmm_(left, right)


def add_half_to_fp32(total: Tensor, left: Tensor, right: Tensor) -> object:
    """One CUDA kernel that multiplies in half precision and adds to fp32 without rounding in between."""
    return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def add_fp32_product(total: Tensor, left: Tensor, right: Tensor) -> object:
    """An fp32 product of half-precision matrices on CUDA, and an addition."""
    return total.add_(torch.mm(left, right, out_dtype=torch.float32))


def add_rounded_product(total: Tensor, left: Tensor, right: Tensor) -> object:
    """The product, rounded to its own dtype, and an addition: no CPU kernel goes from half precision into fp32."""
    return total.add_(left.mm(right))


def addition(
    total: torch.dtype, product: torch.dtype, device: str, release: tuple[int, int] = TORCH_RELEASE
) -> AddProduct:
    """The best way to add a product of matrices of dtype ``product`` to ``total`` on a kind of device.

    ``add_half_to_fp32`` needs an ``addmm`` that takes an fp32 summand for half-precision matrices. PyTorch's pull
    request 167931 brought it after release 2.9; it is trusted from 2.11 on.
    """
    if total == product:
        return add_in_one_dtype
    if device == "cuda" and total == torch.float32 and product in HALF:
        return add_half_to_fp32 if release >= (2, 11) else add_fp32_product
    return add_rounded_product


class WeightGradient:
    """The gradient of one weight, as a sum of products.

    It goes straight into the weight's ``main_grad`` where ``DistributedDataParallel`` made one.
    """

    def __init__(self, weight: Parameter) -> None:
        self._weight = weight
        main_grad: Tensor | None = getattr(weight, "main_grad", None)
        self._is_main_grad = main_grad is not None
        self._total = main_grad if main_grad is not None else _zeros(weight)

    def add(self, grad_output: Tensor, total_input: Tensor) -> None:
        """Adds ``grad_output.T @ total_input``: (tokens, out / tp) and (tokens, in)."""
        add = addition(self._total.dtype, total_input.dtype, total_input.device.type)
        add(self._total, grad_output.t(), total_input)

    def for_autograd(self) -> Tensor:
        """What a backward pass returns for the weight, never None: DDP's hook asserts a gradient under overlapped
        reduction, and None would keep the bucket from being sent.

        Where ``main_grad`` has the sum already, this is a tensor that the hook drops, with whatever its memory holds.
        Of an embedding that is also this stage's head (``zero_out_wgrad``) the hook adds what autograd summed up: the
        embedding's gradient and this tensor, which is zero there.
        """
        if not self._is_main_grad:
            return self._total.to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # read by DDP's hook
        if getattr(self._weight, "zero_out_wgrad", False):
            return torch.zeros_like(self._weight)
        return torch.empty_like(self._weight)


def _zeros(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
