"""Column-parallel matrices that share one input (q, k, v; gate, up), each its own parameter so that each can rest.

One autograd function owns the group: the input is gathered once per direction, kept only if some member trains, and the
input gradients of all members are summed before one collective.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import Parameter

try:  # Apex's fused kernel; absent on CPU and in plain installs.
    import fused_weight_gradient_mlp_cuda
except ImportError:
    fused_weight_gradient_mlp_cuda = None


def _gather_sequence(shard: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """Starts the all-gather of (s / tp, b, h) along the sequence; returns (s, b, h) and its handle."""
    whole = torch.empty((shard.size(0) * group.size(), *shard.shape[1:]), dtype=shard.dtype, device=shard.device)
    return whole, dist.all_gather_into_tensor(whole, shard.contiguous(), group=group, async_op=True)


def accumulate_weight_gradient(weight: Parameter, grad_output: Tensor, total_input: Tensor) -> Tensor:
    """Adds ``grad_output.T @ total_input`` to ``weight.main_grad`` where DDP made one, else returns it.

    grad_output: (tokens, out / tp), total_input: (tokens, in). The returned tensor is never None: with overlapped
    reduction DDP's hook asserts a gradient, and None would keep the bucket from being sent.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        return grad_output.t().matmul(total_input)
    if main_grad.dtype == grad_output.dtype:
        main_grad.addmm_(grad_output.t(), total_input)
    elif fused_weight_gradient_mlp_cuda is not None and main_grad.is_cuda and main_grad.dtype == torch.float32:
        fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(total_input, grad_output, main_grad)
    else:
        # No addmm goes from bf16 into fp32 on CPU: the product rounds to bf16 first, as in Megatron's unfused path.
        main_grad.add_(grad_output.t().matmul(total_input))
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # read by DDP's hook
    return torch.empty_like(weight)


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, group: dist.ProcessGroup, sequence_parallel: bool, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        trains = ctx.needs_input_grad[3:]
        ctx.group, ctx.sequence_parallel, ctx.trains = group, sequence_parallel, trains
        ctx.parameters = weights
        ctx.save_for_backward(*([input] if any(trains) else []), *weights)
        total = input
        if sequence_parallel:
            total, gathered = _gather_sequence(input, group)
            gathered.wait()
        return tuple(total.matmul(weight.t()) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        some_train = any(ctx.trains)
        weights = ctx.saved_tensors[1:] if some_train else ctx.saved_tensors
        total, gathered = None, None
        if some_train:
            total = ctx.saved_tensors[0]
            if ctx.sequence_parallel:
                total, gathered = _gather_sequence(total, ctx.group)

        grad_input, reduced = None, None
        if ctx.needs_input_grad[0]:
            grad_input, reduced = _input_gradient(grad_outputs, weights, ctx.group, ctx.sequence_parallel)

        grad_weights: list[Tensor | None] = [None] * len(weights)
        if total is not None:
            if gathered is not None:
                gathered.wait()
            flat_input = total.reshape(-1, total.size(-1))
            for i, grad_output in enumerate(grad_outputs):
                if ctx.trains[i]:
                    flat_grad = grad_output.reshape(-1, grad_output.size(-1))
                    grad_weights[i] = accumulate_weight_gradient(ctx.parameters[i], flat_grad, flat_input)
        if reduced is not None:
            reduced.wait()
        return grad_input, None, None, *grad_weights


def _input_gradient(
    grad_outputs: tuple[Tensor, ...], weights: tuple[Tensor, ...], group: dist.ProcessGroup, sequence_parallel: bool
) -> tuple[Tensor, dist.Work | None]:
    """Sums the members' input gradients and starts their one reduction over tensor-parallel ranks."""
    total = grad_outputs[0].matmul(weights[0])
    for grad_output, weight in zip(grad_outputs[1:], weights[1:], strict=True):
        flat = total.view(-1, total.size(-1))
        flat.addmm_(grad_output.reshape(-1, grad_output.size(-1)), weight)
    if group.size() == 1:
        return total, None
    if not sequence_parallel:
        return total, dist.all_reduce(total, group=group, async_op=True)
    shard = torch.empty((total.size(0) // group.size(), *total.shape[1:]), dtype=total.dtype, device=total.device)
    return shard, dist.reduce_scatter_tensor(shard, total, group=group, async_op=True)


class _Member(ColumnParallelLinear):
    """Gives the group its weight when called, and does no product of its own.

    It must be called: under --overlap-param-gather the hook that waits for a weight's all-gather runs before the
    forward pass of the very module that owns the weight, and a weight that is merely read may be the last step's.
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
        outputs: tuple[Tensor, ...] = _SharedInput.apply(
            hidden_states, self.tp_group, self.config.sequence_parallel and self.tp_group.size() > 1, *weights
        )
        return outputs
