"""The distributed optimizer of a round: holds the plan, refuses frozen shards, counts its bytes."""

import contextlib
import math
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from hft_megatron.hft.plan import Plan
from hft_megatron.optimizer.penalty import QuadraticPenalty


class NonFiniteNorm(Exception):
    """The norm of a step's gradients, or a loss that was noted beside them, is infinite or undefined.

    Raised on every rank before anything is updated; ``trainer.nonfinite`` catches it and looks for the cause.
    """

    def __init__(self, norm: float) -> None:
        super().__init__(f"the norm of the gradients is {norm:g}")
        self.norm = norm


class HFTDistributedOptimizer(DistributedOptimizer):
    """megatron-core's ``DistributedOptimizer`` for one plan, whose state can be read and set by parameter.

    Every unit has a step count of its own, because moments carried over from earlier rounds are older than those of
    units that were frozen: under an old count the first update of a fresh unit would be about 3 times too large.
    """

    def __init__(self, *args: Any, plan: Plan, unit_of: dict[Parameter, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plan = plan
        self.updates = 0
        """Optimizer steps taken since the wrapping, or since a checkpoint was loaded into it."""
        self.start_steps: dict[str, int] = {}
        """Updates in a unit's moments before those; 0 for units that are not in it."""
        self.penalty: QuadraticPenalty | None = None
        """Added to the gradients of every step, whose norm and clipping it is part of; None costs nothing."""
        self._unit_of = unit_of
        self._flags = [unit in plan.training for unit in unit_of.values()]
        self._loss_term: Tensor | None = None
        self._last_state_bytes: tuple[int, int] | None = None
        self._refuse_frozen_shards(unit_of)

    @classmethod
    @torch.no_grad()
    def _build_model_and_main_param_groups(cls, *args: Any, **kwargs: Any) -> Any:
        # With gradients on, the shards of fp32 parameters would be views inside autograd's graph: torch warns whenever
        # their .grad is read, and loading a checkpoint into them is refused.
        return super()._build_model_and_main_param_groups(*args, **kwargs)

    def _refuse_frozen_shards(self, unit_of: dict[Parameter, str]) -> None:
        in_buckets = {p for buffer in self._live_buffers() for bucket in buffer.buckets for p in bucket.params}
        frozen = sorted(unit_of[p] for p in in_buckets if not self.plan.trains(unit_of[p]))
        assert not frozen, f"frozen units in gradient buckets: {frozen}"
        missing = sorted(unit for p, unit in unit_of.items() if self.plan.trains(unit) and p not in in_buckets)
        assert not missing, f"trainable units in no gradient bucket: {missing}"

    def check_flags(self) -> None:
        """Asserts that every parameter still has the ``requires_grad`` that the plan gave it before wrapping.

        A parameter flipped later would keep its cost and still decay (frozen), or never train (unfrozen), in silence or
        with a bare assertion deep inside the reduction of gradients.
        """
        # In every step: without Python for each parameter as long as all is well.
        assert list(map(attrgetter("requires_grad"), self._unit_of)) == self._flags, (
            f"requires_grad of {self._first_flipped()} was flipped after the model was wrapped for plan "
            f"{self.plan.short_digest}: what trains changes at a switch of rounds only"
        )

    def _first_flipped(self) -> str:
        return min(unit for p, unit in self._unit_of.items() if p.requires_grad != (unit in self.plan.training))

    def _live_buffers(self) -> list[Any]:
        return [] if self.is_stub_optimizer else list(self.buffers)

    @torch.no_grad()
    def note_losses(self, losses: list[Tensor]) -> None:
        """Makes the next norm undefined on all ranks if one of this rank's ``losses`` is not finite.

        On the device, by a term of 0 or NaN in the sum that the ranks make anyway, so that a loss costs no collective
        and no wait of its own and is known before the update.
        """
        self._loss_term = torch.stack([loss.double().sum() for loss in losses]).sum() * 0.0 if losses else None

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """2-norm of the whole model's gradients in fp32, the same on every rank, with one read by the host.

        Raises NonFiniteNorm, on every rank, where the gradients or the losses of ``note_losses`` are infinite or
        undefined.
        """
        with _norm_on_the_device(self._loss_term):
            # A tensor under 0.19 where transformer-engine is installed.
            norm = float(super().get_grad_norm())
        if not math.isfinite(norm):
            raise NonFiniteNorm(norm)
        return norm

    def nonfinite_gradients(self) -> list[str]:
        """Units whose gradient has infinite or undefined entries on this rank; reads every gradient."""
        gradients = {self._unit_of[p]: main.grad for p, main in self._updated_parameters().items()}
        return [unit for unit, grad in gradients.items() if grad is not None and not grad.isfinite().all()]

    def updated_shards(self) -> dict[Parameter, Tensor]:
        """Values that this rank updates, by whole parameter: (elements,) fp32, the newest ones, live tensors."""
        return {p: main.detach() for p, main in self._updated_parameters().items()}

    def _updated_parameters(self) -> dict[Parameter, Tensor]:
        held = {} if self.is_stub_optimizer else self.model_param_gbuf_map
        return {p: self._main_param(p)[1] for p in held}

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        found: bool = super().prepare_grads()
        if self.penalty is not None:
            self.penalty.add_gradient(self._updated_parameters())
        return found

    def reduced_gradients(self) -> dict[Parameter, Tensor]:
        """This rank's shards of the gradients of a finished backward pass, by whole parameter: (elements,) fp32, mean
        over the global batch, live tensors that the next step needs no more. Without a penalty's."""
        super().prepare_grads()
        gradients = {p: main.grad for p, main in self._updated_parameters().items()}
        return {p: gradient for p, gradient in gradients.items() if gradient is not None}

    def step_with_ready_grads(self) -> bool:
        successful: bool = super().step_with_ready_grads()
        self.updates += successful
        return successful

    def _copy_main_params_to_model_params(self) -> None:
        # In fp32 a master is a view of the weights, and would be copied onto itself.
        if self.config.bf16:
            super()._copy_main_params_to_model_params()

    def begin(self, steps: dict[str, int]) -> None:
        """Counts updates from here on; ``steps`` are the updates in units' moments so far, 0 where left out."""
        self.start_steps, self.updates = steps, 0
        self._last_state_bytes = None

    def steps_of(self, unit: str) -> int:
        """AdamW's step count of a training unit; the same on every rank, whether it holds the unit or not."""
        return self.start_steps.get(unit, 0) + self.updates

    # --- its bytes, measured on the live buffers and state

    @property
    def gradient_bytes(self) -> int:
        """Bytes of this rank's gradient buffers, padding included."""
        return sum(buffer.grad_data.nbytes for buffer in self._live_buffers())

    @property
    def master_bytes(self) -> int:
        """Bytes of fp32 master weights that this rank holds; 0 in fp32, where a parameter is its own master."""
        return self._state_bytes[0]

    @property
    def moment_bytes(self) -> int:
        """Bytes of first and second moments that this rank holds now; 0 before the first update."""
        return self._state_bytes[1]

    @property
    def _state_bytes(self) -> tuple[int, int]:
        """Bytes of masters and of moments. Read in every step, so they are summed only until an update has created all
        of them."""
        if self._last_state_bytes is not None:
            return self._last_state_bytes
        if self.is_stub_optimizer:
            return 0, 0
        masters = sum(main.nbytes for group in self.shard_fp32_from_float16_groups for main in group)
        states = self.optimizer.state.values()
        found = masters, sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq"))
        if self.updates > 0:
            self._last_state_bytes = found
        return found

    # --- state of whole parameters, for the next round and for checkpoints

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of a parameter's state; an fp32 parameter is its own master."""
        return ("exp_avg", "exp_avg_sq", "param") if self.config.bf16 else ("exp_avg", "exp_avg_sq")

    def _main_param(self, model_param: Parameter) -> tuple[dict[str, Any], Tensor]:
        group_index, order = self.model_param_group_index_map[model_param]
        group = self.optimizer.param_groups[group_index]
        return group, group["params"][order]

    def shard_of(self, model_param: Parameter) -> tuple[int, dict[str, Tensor]] | None:
        """Start of this rank's shard in the flat parameter, and its state; None where this rank holds none of it.

        The state are (elements,) fp32 tensors by ``state_names``, the optimizer's own; moments are zero before the
        first update, which is what AdamW would start from.
        """
        held = self.range_of(model_param)
        if held is None:
            return None
        _, main = self._main_param(model_param)
        state = self.optimizer.state.get(main) or {}
        moments = {key: state[key] if state else torch.zeros_like(main) for key in ("exp_avg", "exp_avg_sq")}
        tensors = moments | {"param": main}
        return held.start, {name: tensors[name].detach() for name in self.state_names}

    def range_of(self, model_param: Parameter) -> slice | None:
        """The elements of the flat parameter that this rank updates; None where it updates none of them."""
        if self.is_stub_optimizer or model_param not in self.model_param_gbuf_map:
            return None
        held = self._get_model_param_range_map(model_param)["param"]
        return slice(held.start, held.end)

    def drop_shard(self, model_param: Parameter) -> None:
        """Frees this rank's shard of a parameter's state; the optimizer cannot step after that."""
        if model_param not in self.model_param_gbuf_map:
            return
        _, main = self._main_param(model_param)
        self._last_state_bytes = None
        self.optimizer.state.pop(main, None)
        if self.config.bf16:
            main.data = main.data.new_empty(0)  # A view of the weights in fp32.

    def set_shard(self, model_param: Parameter, wholes: dict[str, Tensor]) -> None:
        """Copies this rank's shard out of a parameter's whole state: flat fp32 tensors by ``state_names``."""
        held = self.range_of(model_param)
        if held is None:
            return
        group, main = self._main_param(model_param)
        steps = self.steps_of(self._unit_of[model_param])
        self._last_state_bytes = None
        with torch.no_grad():
            if "param" in wholes:
                main.copy_(wholes["param"][held])
            if steps == 0:
                return
            state = self.optimizer.state[main]
            for name, whole in wholes.items():
                if name != "param":
                    state[name] = whole[held].to(main.device, copy=True)
        if isinstance(self.optimizer, torch.optim.AdamW):
            # A tensor of its own: megatron-core shares one, which AdamW then advances once per parameter. On the
            # device, where the fused one reads it.
            state["step"] = torch.tensor(float(steps), device=main.device)
        else:
            group["step"] = steps  # Apex and transformer-engine keep it by group


@contextlib.contextmanager
def _norm_on_the_device(loss_term: Tensor | None) -> Iterator[None]:
    """Within it, ``loss_term``, () of 0 or NaN, is added to megatron-core's norm, where there is one.

    megatron-core's own kernel, which reads every tensor's norm on the host, is replaced; those of transformer-engine
    and Apex are left alone.
    """
    found, norm_of = clip_grads.l2_norm_impl, optimizer.get_grad_norm_fp32
    kernel = _l2_norm if found is local_multi_tensor_l2_norm else found
    clip_grads.l2_norm_impl = kernel
    if loss_term is not None:
        clip_grads.l2_norm_impl = _with_term(kernel, loss_term)
        alone = [loss_term.float().reshape(1)]
        # A rank without gradients would not call the kernel.
        optimizer.get_grad_norm_fp32 = lambda gradients, **options: norm_of(gradients or alone, **options)
    try:
        yield
    finally:
        clip_grads.l2_norm_impl, optimizer.get_grad_norm_fp32 = found, norm_of


def _with_term(kernel: Callable[..., Any], term: Tensor) -> Callable[..., Any]:
    def norm_and_term(*args: Any) -> tuple[Tensor, Any]:
        norm, by_tensor = kernel(*args)
        return norm + term.to(norm.dtype), by_tensor

    return norm_and_term


def _l2_norm(chunk: int, overflow: Tensor, tensors: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    """Stand-in for Apex's ``multi_tensor_l2norm``: (1,), the 2-norm of all tensors of the one list."""
    [gradients] = tensors
    return get_total_norm(gradients).reshape(1), None
