"""A plan on any torch module whose parameters have Hugging Face's names: transformers' models, with PEFT or without.

``Plan.apply`` and ``Plan.audit`` are the doors. What trains is decided by ``requires_grad``, so whatever looks at
gradients later (autograd, DistributedDataParallel, FSDP, an optimizer) leaves frozen weights alone.
"""

import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hft_megatron.hft.on_ranks import fingerprint
from hft_megatron.hft.plan import Plan
from hft_megatron.hft.units import EMBEDDING_NAME

_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
"""What DistributedDataParallel, torch.compile, FSDP and checkpoint wrappers put into names."""
_PEFT_PREFIX = "base_model.model."
_PEFT_BASE = (".base_layer.weight", ".original_module.weight")
"""Ends of the names of weights that PEFT has put something beside, and keeps frozen."""
_HOOK = "_hft_plan_hook"


def apply_to_module(plan: Plan, model: nn.Module, optimizer: Optimizer | None) -> None:
    """What ``Plan.apply`` does."""
    parameters = list(_parameters(plan, model))
    for unit, name, parameter in parameters:
        if name == f"{unit}.weight" and parameter.is_floating_point() and parameter.numel():
            expected = plan.parameters_of(unit)
            if parameter.numel() != expected:
                raise ValueError(
                    f"{name} has {parameter.numel():,} parameters and {expected:,} in the plan, which was drawn for "
                    "another model; draw it from this model's config."
                )
    with_adapters = any(name != f"{unit}.weight" for unit, name, _ in parameters)
    found = {unit for unit, _, _ in parameters}
    missing = next((unit.name for unit in plan.units if unit.name not in found), None)
    if missing is not None:
        raise ValueError(
            f"the model has no parameter of {missing}, which is in the plan; draw the plan from this model's config, "
            "and give the model with its head."
        )
    for unit, name, parameter in parameters:
        is_base = with_adapters and (name == f"{unit}.weight" or name.endswith(_PEFT_BASE))
        parameter.requires_grad_(plan.trains(unit) and not is_base)
        if not parameter.requires_grad:
            parameter.grad = None
    if optimizer is not None:
        _check_optimizer(plan, parameters, optimizer)
    _guard(plan, model, parameters)


def _parameters(plan: Plan, model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(unit, name without wrappers, parameter) of everything that the model holds. ValueError for what has no unit."""
    units = {unit.name for unit in plan.units}
    for written, parameter in model.named_parameters():
        name = _WRAPPERS.sub("", written).lstrip(".").removeprefix(_PEFT_PREFIX)
        parts = name.split(".")
        unit = next((prefix for length in range(len(parts) - 1, 0, -1)
                     if (prefix := ".".join(parts[:length])) in units), None)  # fmt: skip
        if unit is None:
            raise ValueError(
                f"the parameter {written} belongs to no unit of the plan, whose units are the weights of a LLaMA by "
                "Hugging Face's names; apply it to the part of the model that has these, or draw it from this model's "
                "config."
            )
        yield unit, name, parameter


def _check_optimizer(plan: Plan, parameters: list[tuple[str, str, nn.Parameter]], optimizer: Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    frozen = [name for _, name, parameter in parameters if not parameter.requires_grad and id(parameter) in held]
    if frozen:
        raise ValueError(
            f"the optimizer holds {len(frozen)} parameters that the plan freezes, first {frozen[0]}; apply the plan "
            "first, and make the optimizer of the parameters that require gradients."
        )


class _Guard:
    """A hook on the embedding, which every forward pass goes through, also where PEFT calls the model's own forward.

    In training it raises where something has changed what trains since the plan was applied, instead of training other
    weights in silence. And a frozen embedding's output gets a gradient under gradient checkpointing, whose reentrant
    kind otherwise gives none to the layers above.
    """

    def __init__(self, plan: Plan, model: nn.Module, parameters: list[tuple[str, str, nn.Parameter]]) -> None:
        self._digest = plan.short_digest
        # Weak, because FSDP puts other parameters in place of these.
        self._flags = [(name, weakref.ref(one), one.requires_grad) for _, name, one in parameters]
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has parameters of its own, which this plan was not applied to.
        return {"_digest": self._digest, "_flags": [], "_model": lambda: None}

    def __call__(self, embedding: nn.Module, inputs: Any, output: Any) -> Any:
        if not embedding.training:
            return output
        for name, parameter, trains in self._flags:
            held = parameter()
            if held is not None and held.requires_grad != trains:
                raise RuntimeError(
                    f"{name} was {'trainable' if trains else 'frozen'} by plan {self._digest} and no longer is: "
                    "something changed requires_grad after plan.apply; apply the plan last, after PEFT and before the "
                    "optimizer."
                )
        model = self._model()
        checkpointed = model is not None and any(
            getattr(part, "gradient_checkpointing", False) for part in model.modules()
        )
        if checkpointed and isinstance(output, Tensor) and not output.requires_grad:
            return output.requires_grad_(True)
        return output


def _guard(plan: Plan, model: nn.Module, parameters: list[tuple[str, str, nn.Parameter]]) -> None:
    weight = next(one for unit, name, one in parameters if unit == EMBEDDING_NAME and name.endswith("weight"))
    embedding = next(part for part in model.modules() if any(one is weight for one in part.parameters(recurse=False)))
    before = getattr(embedding, _HOOK, None)
    if before is not None:
        before.remove()
    setattr(embedding, _HOOK, embedding.register_forward_hook(_Guard(plan, model, parameters)))


def audit_module(plan: Plan, model: nn.Module) -> Callable[[], None]:
    """What ``Plan.audit`` does."""
    before: Mapping[str, tuple[nn.Parameter, int]] = {
        name: (parameter, fingerprint(parameter))
        for unit, name, parameter in _parameters(plan, model)
        if not parameter.requires_grad
    }

    def verify() -> None:
        changed = [name for name, (parameter, bits) in before.items() if fingerprint(parameter) != bits]
        if changed:
            raise RuntimeError(
                f"{len(changed)} of {len(before)} frozen weights have changed, first {changed[0]}; something outside "
                "the optimizer wrote to them, or they are in an optimizer that was made before the plan was applied."
            )

    return verify
