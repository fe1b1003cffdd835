"""A plan reaches the flags of exactly its parameters, and only before wrapping."""

import pytest
import torch

from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.hft.on_ranks import apply_plan
from hft_megatron.hft.plan import Plan, make_plan
from hft_megatron.model.parameters import ParameterSlot

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=4,
    vocab_size=16,
    max_position_embeddings=16,
)


def plan_of_round(number: int) -> Plan:
    return make_plan(SHAPE, HFTConfig(), default_seed=3, round=number)


def slot(unit: str) -> ParameterSlot:
    parameter = torch.nn.Parameter(torch.zeros(2))
    return ParameterSlot(parameter=parameter, local_name=unit, unit=unit, cut=None, is_vocab=False)


@pytest.fixture
def slots() -> list[ParameterSlot]:
    """One parameter per unit, and a second copy of the embedding as tied models have on another stage."""
    return [slot(unit.name) for unit in plan_of_round(0).units] + [slot("model.embed_tokens")]


def flags(slots: list[ParameterSlot]) -> list[bool]:
    return [s.parameter.requires_grad for s in slots]


def test_every_flag_says_what_the_plan_says(slots):
    plan = plan_of_round(0)
    apply_plan(slots, plan)
    assert flags(slots) == [plan.trains(s.unit) for s in slots]
    assert len({*flags(slots)}) == 2


def test_the_next_plan_takes_frozen_units_back_into_training(slots):
    first, second = plan_of_round(0), plan_of_round(1)
    assert first.training - second.training
    assert second.training - first.training
    apply_plan(slots, first)
    apply_plan(slots, second)
    assert flags(slots) == [second.trains(s.unit) for s in slots]


@pytest.mark.parametrize("trains", [True, False])
def test_a_parameter_that_is_still_wrapped_is_refused_by_name(slots, trains):
    plan = plan_of_round(0)
    wrapped = next(s for s in slots if plan.trains(s.unit) == trains)
    wrapped.parameter.main_grad = torch.zeros(2)
    with pytest.raises(AssertionError, match=rf"{wrapped.hf_name} is still wrapped"):
        apply_plan(slots, plan)


def test_a_unit_that_the_model_has_not_is_refused(slots):
    with pytest.raises(AssertionError, match=r"model\.layers\.9\.mlp\.up_proj is not a unit"):
        apply_plan([*slots, slot("model.layers.9.mlp.up_proj")], plan_of_round(0))
