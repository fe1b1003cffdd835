"""Gives a plan to a model: which of this rank's parameters require gradients. Must run before any wrapping.

megatron-core lays out gradient buffers and optimizer groups from ``requires_grad`` at construction; a flag flipped
later is wrong in silence.
"""

from collections.abc import Sequence

from hft_megatron.hft.plan import Plan
from hft_megatron.model.parameters import ParameterSlot


def apply_plan(slots: Sequence[ParameterSlot], plan: Plan) -> None:
    """Sets ``requires_grad`` of every parameter of this rank to whether its unit trains."""
    for slot in slots:
        assert not hasattr(slot.parameter, "main_grad"), f"{slot.hf_name} is still wrapped for an earlier plan"
        slot.parameter.requires_grad = plan.trains(slot.unit)
