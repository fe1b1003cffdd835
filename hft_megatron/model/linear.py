"""Linear layers whose matrices share their input, each trainable or frozen; and how they compute weight gradients.

With weights in half precision gradients are accumulated in fp32, and on CUDA no product is rounded on its way there.

One autograd function owns the group: the input is gathered once per direction, kept only if a member trains, and the
input gradients of all members are summed before one collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from hft_megatron.model.adapters import LowRank

AddProduct = Callable[[Tensor, Tensor, Tensor, int], object]
"""``add(total, left, right, beta)``: total (m, n) becomes beta x total + left (m, k) @ right (k, n). beta is 1, or 0
to ignore its former content."""
HALF = (torch.bfloat16, torch.float16)
TORCH_RELEASE: tuple[int, int] = tuple(int(part) for part in torch.__version__.split(".")[:2])  # type: ignore[assignment]


def add_in_one_dtype(total: Tensor, left: Tensor, right: Tensor, beta: int) -> object:
    """One kernel, where all three have one dtype."""
    return total.addmm_(left, right, beta=beta)


def add_half_to_fp32(total: Tensor, left: Tensor, right: Tensor, beta: int) -> object:
    """One CUDA kernel that multiplies in half precision and adds to fp32 without rounding in between."""
    return torch.addmm(total, left, right, beta=beta, out_dtype=torch.float32, out=total)


def add_fp32_product(total: Tensor, left: Tensor, right: Tensor, beta: int) -> object:
    """An fp32 product of half-precision matrices on CUDA, and an addition."""
    product = torch.mm(left, right, out_dtype=torch.float32)
    return total.add_(product) if beta else total.copy_(product)


def add_rounded_product(total: Tensor, left: Tensor, right: Tensor, beta: int) -> object:
    """The product, rounded to its own dtype, and an addition: no CPU kernel adds half precision to fp32."""
    product = left.mm(right)
    return total.add_(product) if beta else total.copy_(product)


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

    It is added directly to the weight's ``main_grad`` where ``DistributedDataParallel`` made one. If the weight is in
    the set ``weight.unwritten_gradients``, the first product of a step overwrites the buffer, which then needs no
    clearing.
    """

    def __init__(self, weight: Parameter) -> None:
        self._weight = weight
        main_grad: Tensor | None = getattr(weight, "main_grad", None)
        self.is_main_grad = main_grad is not None
        self._total = main_grad if main_grad is not None else _zeros(weight)

    def add(self, grad_output: Tensor, total_input: Tensor) -> None:
        """Adds ``grad_output.T @ total_input``: (tokens, out / tp) and (tokens, in)."""
        add = addition(self._total.dtype, total_input.dtype, total_input.device.type)
        add(self._total, grad_output.t(), total_input, 0 if self._begins() else 1)

    def add_rows(self, rows: Tensor, gradients: Tensor) -> None:
        """Adds ``gradients`` (tokens, in) to ``rows`` (tokens,), of which some may repeat; in the same order, and to
        the same bits, in every run."""
        if self._begins():
            self._total.zero_()
        self._total.index_put_((rows,), gradients.to(self._total.dtype), accumulate=True)

    def _begins(self) -> bool:
        """True if this is the first gradient that the step writes."""
        unwritten: set[Tensor] = getattr(self._weight, "unwritten_gradients", set())
        begins = self._weight in unwritten
        unwritten.discard(self._weight)
        return begins

    def for_autograd(self) -> Tensor:
        """The gradient that a backward pass returns for the weight, never None: DDP's hook asserts a gradient under
        overlapped reduction, and None would keep the bucket from being sent.

        Where ``main_grad`` has the sum already, this is a tensor with arbitrary content that the hook drops.
        """
        if not self.is_main_grad:
            return self._total.to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # read by DDP's hook
        return torch.empty_like(self._weight)


def _zeros(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def gather_sequence(shard: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """Starts the all-gather of (s / tp, b, h) along the sequence; returns (s, b, h) and its handle."""
    whole = torch.empty((shard.size(0) * group.size(), *shard.shape[1:]), dtype=shard.dtype, device=shard.device)
    return whole, dist.all_gather_into_tensor(whole, shard.contiguous(), group=group, async_op=True)


def reduce_input_gradient(
    gradient: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> tuple[Tensor, dist.Work | None]:
    """Starts the sum of (s, b, h) over tensor-parallel ranks, none without a group of several; returns the result,
    (s / tp, b, h) under sequence parallelism, and the handle to wait for."""
    if group is None or group.size() == 1:
        return gradient, None
    if not sequence_parallel:
        return gradient, dist.all_reduce(gradient, group=group, async_op=True)
    shape = (gradient.size(0) // group.size(), *gradient.shape[1:])
    shard = torch.empty(shape, dtype=gradient.dtype, device=gradient.device)
    return shard, dist.reduce_scatter_tensor(shard, gradient, group=group, async_op=True)


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        trains = ctx.needs_input_grad[3:]
        ctx.group, ctx.sequence_parallel, ctx.trains = group, sequence_parallel, trains
        ctx.parameters = weights
        ctx.save_for_backward(*([input] if any(trains) else []), *weights)
        total = input
        if sequence_parallel:
            assert group is not None
            total, gathered = gather_sequence(input, group)
            gathered.wait()
        # As matrices: matmul may treat each token as a batch of its own where a dimension of one has an odd stride.
        flat = total.reshape(-1, total.size(-1))
        return tuple(flat.mm(weight.t()).view(*total.shape[:-1], -1) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        some_train = any(ctx.trains)
        weights = ctx.saved_tensors[1:] if some_train else ctx.saved_tensors
        total, gathered = None, None
        if some_train:
            total = ctx.saved_tensors[0]
            if ctx.sequence_parallel:
                total, gathered = gather_sequence(total, ctx.group)

        grad_input, reduced = None, None
        if ctx.needs_input_grad[0]:
            grad_input, reduced = reduce_input_gradient(
                _input_gradient(grad_outputs, weights), ctx.group, ctx.sequence_parallel
            )

        grad_weights: list[Tensor | None] = [None] * len(weights)
        if total is not None:
            if gathered is not None:
                gathered.wait()
            flat_input = total.reshape(-1, total.size(-1))
            for i, grad_output in enumerate(grad_outputs):
                if ctx.trains[i]:
                    flat_grad = grad_output.reshape(-1, grad_output.size(-1))
                    gradient = WeightGradient(ctx.parameters[i])
                    gradient.add(flat_grad, flat_input)
                    grad_weights[i] = gradient.for_autograd()
        if reduced is not None:
            reduced.wait()
        return grad_input, None, None, *grad_weights


def _input_gradient(grad_outputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
    """The sum of the members' input gradients, (s, b, h)."""
    first, *others = (grad_output.reshape(-1, grad_output.size(-1)) for grad_output in grad_outputs)
    total = first.mm(weights[0])
    for grad_output, weight in zip(others, weights[1:], strict=True):
        total.addmm_(grad_output, weight)
    return total.view(*grad_outputs[0].shape[:-1], -1)


def product(input: Tensor, weight: Tensor) -> Tensor:
    """``input @ weight.T`` of one matrix on this rank alone, kept, skipped and accumulated by the group's rules."""
    output: Tensor
    (output,) = _SharedInput.apply(input, None, False, weight)
    return output


class _Adapted(torch.nn.Module):
    """A megatron-core matrix that ``adapters.add_adapters`` may put an adapter beside."""

    weight: Parameter
    adapter: LowRank
    is_adapted = False
    """True if there is one."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """megatron-core's description, in which the adapter's two matrices are cut in their own ways."""
        described: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        if self.is_adapted:
            group: Any = self.tp_group
            described |= self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata, group)
        return described


class RowParallel(_Adapted, RowParallelLinear):
    """megatron-core's row-parallel matrix (o_proj, down_proj), whose product is ``product``.

    Its weight gradient is added directly to ``main_grad``, and no unneeded input gradient is computed.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, **_: Any) -> Tensor:
        output = product(input, weight)
        if not (self.is_adapted and self.adapter.is_on):
            return output
        return self.adapter.added(output, product(self.adapter.dropped(input), self.adapter.lora_A()))


class _Member(_Adapted, ColumnParallelLinear):
    """Gives the group its weight when called, and computes no product of its own.

    It must be called: under --overlap-param-gather the hook that waits for a weight's all-gather runs before the
    forward pass of the module that owns the weight, and a weight that is merely read may be the last step's.
    """

    def forward(self) -> Parameter:
        weight: Parameter = self.weight
        return weight


class SharedInputColumnParallel(MegatronModule):
    """Column-parallel matrices by name over one input: ``{"q_proj": rows, ...}``.

    The members are megatron-core's own ``ColumnParallelLinear`` (initialisation, shards, checkpoint keys); only their
    forward pass is replaced. Rows are in Hugging Face's order, and a tensor-parallel rank holds a plain slice of them.

    forward: (s / tp or s, b, h) -> one (s, b, rows / tp) per member.
    """

    def __init__(
        self,
        config: ModelParallelConfig,
        *,
        input_size: int,
        rows: dict[str, int],
        init_method: Callable[[Tensor], None],
        tp_group: dist.ProcessGroup,
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.member_names = tuple(rows)
        self.is_adapted = False
        for name, output_size in rows.items():
            member = _Member(
                input_size,
                output_size,
                config=config,
                init_method=init_method,
                bias=False,
                gather_output=False,
                tp_group=tp_group,
            )
            self.add_module(name, member)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        weights = [getattr(self, name)() for name in self.member_names]
        splits = self.config.sequence_parallel and self.tp_group.size() > 1
        if self.is_adapted:
            return self._with_adapters(hidden_states, weights, splits)
        outputs: tuple[Tensor, ...] = _SharedInput.apply(hidden_states, self.tp_group, splits, *weights)
        return outputs

    def _with_adapters(self, hidden_states: Tensor, weights: list[Parameter], splits: bool) -> tuple[Tensor, ...]:
        members = [getattr(self, name) for name in self.member_names]
        adapters = {i: one.adapter for i, one in enumerate(members) if one.is_adapted and one.adapter.is_on}
        inner: Sequence[Tensor]
        if any(adapter.drops for adapter in adapters.values()):
            # Each drops other entries, of a whole input that is then kept as such.
            total = _whole_input(hidden_states, self.tp_group, splits)
            outputs = list(_SharedInput.apply(total, None, False, *weights))
            inner = [product(adapter.dropped(total), adapter.lora_A()) for adapter in adapters.values()]
        else:
            factors = [adapter.lora_A() for adapter in adapters.values()]
            products = _SharedInput.apply(hidden_states, self.tp_group, splits, *weights, *factors)
            outputs, inner = list(products[: len(weights)]), products[len(weights) :]
        for (i, adapter), one in zip(adapters.items(), inner, strict=True):
            outputs[i] = adapter.added(outputs[i], one)
        return tuple(outputs)


def _whole_input(shard: Tensor, group: dist.ProcessGroup, sequence_parallel: bool) -> Tensor:
    """(s / tp or s, b, h) -> (s, b, h), whose gradient is the sum over tensor-parallel ranks."""
    whole: Tensor
    if sequence_parallel:
        whole = gather_from_sequence_parallel_region(shard, tensor_parallel_output_grad=True, group=group)
    else:
        whole = copy_to_tensor_model_parallel_region(shard, group=group)
    return whole
