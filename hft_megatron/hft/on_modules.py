"""A plan on any torch module whose parameters have Hugging Face's names: transformers' models, with PEFT or without.

``Plan.apply`` and ``Plan.audit`` are the entry points. ``requires_grad`` decides what trains, so everything that uses
gradients later (autograd, DistributedDataParallel, FSDP, an optimizer) leaves frozen weights alone.
"""

import re
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hft_megatron.hft.on_ranks import fingerprint
from hft_megatron.hft.plan import Plan
from hft_megatron.hft.units import EMBEDDING_NAME

_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_checkpoint_wrapped_module)(?=\.|$)")
"""Parts of names that torch.compile, checkpoint wrappers and the like add."""
_FSDP1 = "_fsdp_wrapped_module"
_PEFT_PREFIX = "base_model.model."
_PEFT_BASE = ("base_layer", "original_module")
"""Names in PEFT's wrappers of the module that they replace and keep frozen."""
_HOOKS = "_hft_plan_hooks"


class _Parameter(NamedTuple):
    name: str
    """Name without wrappers."""
    unit: str
    tensor: nn.Parameter
    trains: bool | None
    """None where the plan does not decide: an adapter of PEFT's that isn't active."""


def apply_to_module(plan: Plan, model: nn.Module, optimizer: Optimizer | None) -> None:
    """Implementation of ``Plan.apply``."""
    _check_is_not_wrapped(model)
    parameters = list(_parameters(plan, model))
    found = {one.unit for one in parameters}
    missing = next((unit.name for unit in plan.units if unit.name not in found), None)
    if missing is not None:
        raise ValueError(
            f"the model has no parameter for the plan's unit {missing}; draw the plan from this model's config, and "
            "give the model with its head."
        )
    if not any(one.trains for one in parameters):
        raise ValueError(
            "nothing in this model would train: no unit that the plan trains has an adapter; give PEFT more target "
            "modules, or draw another plan."
        )
    for one in parameters:
        if one.trains is not None:
            one.tensor.requires_grad_(one.trains)
        if not one.tensor.requires_grad:
            one.tensor.grad = None
    if optimizer is not None:
        _check_optimizer(parameters, optimizer)
    _guard(plan, model)


def _check_is_not_wrapped(model: nn.Module) -> None:
    """Refuse wrappers that read ``requires_grad`` only when they are made."""
    for name, part in model.named_modules():
        if isinstance(part, DistributedDataParallel) or _FSDP1 in name.split("."):
            wrapper = "DistributedDataParallel" if isinstance(part, DistributedDataParallel) else "FSDP"
            raise ValueError(
                f"the model is already wrapped in {wrapper}, which fixed the gradients it reduces when it was made; "
                "apply the plan to the model itself, and wrap it afterwards, again in every round."
            )


def _parameters(plan: Plan, model: nn.Module) -> Iterator[_Parameter]:
    """All parameters of the model. ValueError for one that belongs to no unit, or has another size than its unit."""
    units = {unit.name: unit.parameters for unit in plan.units}
    wrapped = {_plain(name): part for name, part in model.named_modules() if _is_of_peft(part)}
    for written, tensor in model.named_parameters():
        name = _plain(written)
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
        unit = next((prefix for prefix in prefixes if prefix in units), None)
        inner = None if unit is None else parts[len(unit.split(".")) :]
        if unit is None or inner is None or (inner != ["weight"] and unit not in wrapped):
            raise ValueError(
                f"the parameter {written} belongs to no unit of the plan, whose units are the weights of a LLaMA under "
                "Hugging Face's names; apply the plan to the part of the model that has these, or draw it from this "
                "model's config."
            )
        is_base = inner == ["weight"] or inner[0] in _PEFT_BASE
        if is_base and tensor.is_floating_point() and tensor.numel() not in (0, units[unit]):
            raise ValueError(
                f"{name} has {tensor.numel():,} parameters, but {units[unit]:,} in the plan, which was drawn for "
                "another model; draw the plan from this model's config."
            )
        trains: bool | None = plan.trains(unit) and not (is_base and wrapped)
        if not is_base and not set(inner) & set(wrapped[unit].active_adapters):
            trains = None
        yield _Parameter(name=name, unit=unit, tensor=tensor, trains=trains)


def _plain(name: str) -> str:
    return _WRAPPERS.sub("", name).lstrip(".").removeprefix(_PEFT_PREFIX)


def _is_of_peft(part: nn.Module) -> Any:
    """Return whether it is a wrapper of PEFT's in the place of a module."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    return isinstance(part, (BaseTunerLayer, ModulesToSaveWrapper))


def _check_optimizer(parameters: list[_Parameter], optimizer: Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    frozen = [one.name for one in parameters if not one.tensor.requires_grad and id(one.tensor) in held]
    if frozen:
        raise ValueError(
            f"the optimizer holds {len(frozen)} parameters that the plan freezes, first {frozen[0]}; apply the plan "
            "first, and build the optimizer from the parameters that require gradients."
        )
    lacking = [one.name for one in parameters if one.tensor.requires_grad and id(one.tensor) not in held]
    if lacking:
        raise ValueError(
            f"the optimizer lacks {len(lacking)} parameters that the plan trains, first {lacking[0]}; build a new one "
            "from the parameters that require gradients."
        )


class _Guard:
    """Checks before every forward pass in training that ``requires_grad`` is still as the plan set it.

    Otherwise other weights would be trained in silence. It also makes a frozen embedding's output require a gradient
    under gradient checkpointing, whose reentrant kind otherwise gives none to the layers above.
    """

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        self._plan = plan
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self._flags: list[tuple[str, weakref.ref[nn.Parameter], bool]] = []
        self._look()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model, or one that is read back, has parameters of its own, which no plan was applied to.
        return {"_plan": self._plan, "_model": None, "_flags": []}

    def _look(self) -> None:
        model = self._model() if self._model is not None else None
        assert model is not None
        self._flags = [
            (one.name, weakref.ref(one.tensor), one.trains)
            for one in _parameters(self._plan, model)
            if one.trains is not None
        ]

    def check(self, part: nn.Module, *inputs: Any) -> None:
        """Raises RuntimeError where ``requires_grad`` of a parameter has changed."""
        if self._model is None or not part.training:
            return
        # FSDP 2 replaces the parameters that it finds.
        if any(reference() is None for _, reference, _ in self._flags):
            self._look()
        for name, reference, trains in self._flags:
            tensor = reference()
            if tensor is not None and tensor.requires_grad != trains:
                raise RuntimeError(
                    f"plan {self._plan.short_digest} made {name} {'trainable' if trains else 'frozen'}, but something "
                    "changed its requires_grad after plan.apply; apply the plan last, after PEFT and before the "
                    "optimizer."
                )

    def let_checkpoints_train(self, embedding: nn.Module, inputs: Any, output: Any) -> Any:
        """A forward hook of the embedding."""
        model = self._model() if self._model is not None else None
        if model is None or not embedding.training or not isinstance(output, Tensor) or output.requires_grad:
            return output
        checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
        return output.requires_grad_(True) if checkpointed else output


def _guard(plan: Plan, model: nn.Module) -> None:
    """Puts the guard on the first layer, which the caller's own embeddings pass as well, and on the embedding, or on
    PEFT's wrapper in its place. Both are called as modules even where PEFT calls the model's own forward."""
    parts = {_plain(name): part for name, part in model.named_modules(remove_duplicate=False)}
    embedding, layer = parts[EMBEDDING_NAME], parts["model.layers.0"]
    for hook in getattr(embedding, _HOOKS, ()):
        hook.remove()
    guard = _Guard(plan, model)
    hooks = [
        embedding.register_forward_hook(guard.let_checkpoints_train),
        layer.register_forward_pre_hook(guard.check),
    ]
    setattr(embedding, _HOOKS, hooks)


def audit_module(plan: Plan, model: nn.Module) -> Callable[[], None]:
    """Implementation of ``Plan.audit``."""
    frozen = [one for one in _parameters(plan, model) if not one.tensor.requires_grad]
    before = [_bits(one.tensor) for one in frozen]

    def verify() -> None:
        changed = [one.name for one, bits in zip(frozen, before, strict=True) if _bits(one.tensor) != bits]
        if changed:
            raise RuntimeError(
                f"{len(changed)} of {len(frozen)} frozen weights have changed, first {changed[0]}; something outside "
                "the optimizer wrote to them, or they are in an optimizer that was built before the plan was applied."
            )

    return verify


def _bits(tensor: Tensor) -> int:
    """A fingerprint of the part that this process holds."""
    return fingerprint(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
