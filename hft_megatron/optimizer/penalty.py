"""A quadratic penalty on the weights that an optimizer updates, in the shards that it holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor
from torch.nn import Parameter


@dataclass(kw_only=True)
class QuadraticPenalty:
    """``strength / 2 * sum_i curvature_i * (weight_i - anchor_i)^2``, as if it were part of the loss.

    Every rank of a run has one or none has: those that update nothing have one without shards.
    """

    strength: float
    curvature: Mapping[Parameter, Tensor]
    """Curvature of this rank's shard, by whole parameter: (elements,) fp32."""
    anchor: Mapping[Parameter, Tensor]
    """Values that each weight is pulled towards, likewise."""
    _value: Tensor | None = field(default=None, init=False)

    @property
    def bytes(self) -> int:
        """Memory of the tensors that this rank holds."""
        return sum(tensor.nbytes for held in (self.curvature, self.anchor) for tensor in held.values())

    @torch.no_grad()
    def add_gradient(self, weights: Mapping[Parameter, Tensor]) -> None:
        """Adds its gradient, ``strength * curvature * (weight - anchor)``, to the gradients of the ``weights``: this
        rank's fp32 shards that the optimizer updates, by whole parameter."""
        assert weights.keys() == self.curvature.keys() == self.anchor.keys()
        total = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
        for parameter, weight in weights.items():
            assert weight.grad is not None
            distance = weight - self.anchor[parameter]
            pull = self.curvature[parameter] * distance
            weight.grad.add_(pull, alpha=self.strength)
            # What several ranks hold alike counts once, as in megatron-core's norm of the gradients.
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
                total += (pull * distance).sum(dtype=torch.float64)
        self._value = total * (self.strength / 2)

    def value(self) -> float:
        """The penalty of the whole model before the last step; collective over all ranks of the run."""
        assert self._value is not None, "no step has been taken"
        total = self._value.clone()
        torch.distributed.all_reduce(total)
        return float(total)
