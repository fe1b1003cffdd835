"""Frozen embeddings and lists of units. Run: pytest tests/hft/test_overrides.py"""

from typing import Any

import pytest

from hft_megatron.config.hft import HFTConfig
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan, make_plan
from tests.support.shapes import tiny_shape

RULES: list[dict[str, Any]] = [
    {},
    {"level": "layer"},
    {"level": "model"},
    {"counting": "parameters"},
    {"pairing": "complementary"},
    {"rotation": "complementary"},
    {"selection": "lisa"},
    {"selection": "hift", "ratio": 0.9},
    {"selection": "spectrum"},
]


def draw(*, tied: bool = False, round: int = 0, **options: Any) -> Plan:
    shape = tiny_shape(3, tied=tied)
    scores = {unit.name: float(unit.parameters) for unit in make_plan(shape, HFTConfig(), default_seed=0).units}
    config = HFTConfig(**{f"hft_{name}": value for name, value in options.items()})
    return make_plan(shape, config, default_seed=0, round=round, scores=scores)


@pytest.mark.parametrize("options", RULES, ids=str)
def test_freezes_and_lists_override_every_rule_in_every_round(options: dict[str, Any]) -> None:
    for round in range(3):
        free = draw(round=round, **options).training
        held = draw(
            round=round,
            freeze_embedding=True,
            freeze_head=True,
            train="model.layers.0.*",
            freeze="*.1.mlp.*,model.norm",
            **options,
        ).training
        always = {unit.name for unit in draw().units if unit.layer == 0}
        never = {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
        never |= {"model.embed_tokens", "lm_head", "model.norm"}
        assert held == (free | always) - never


def test_frozen_tied_embeddings_stay_frozen() -> None:
    plan = draw(tied=True, freeze_embedding=True, freeze_head=True)
    assert draw(tied=True).training - plan.training == {"model.embed_tokens"}


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("lm_head", {"lm_head"}),
        ("lm_head.weight", {"lm_head"}),
        (" model.norm , lm_head", {"model.norm", "lm_head"}),
        (
            "*.layers.?.self_attn.[qk]_proj.weight",
            {f"model.layers.{n}.self_attn.{x}_proj" for n in "012" for x in "qk"},
        ),
        ("model.norm,model.*", {unit.name for unit in draw().units} - {"lm_head"}),
    ],
)
def test_patterns_are_shell_patterns_over_names_with_or_without_weight(pattern: str, matched: set[str]) -> None:
    everything = {unit.name for unit in draw().units}
    assert draw(ratio=1.0, freeze=pattern).training == everything - matched
    assert draw(ratio=0.0, train=pattern).training == draw(ratio=0.0).training | matched


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"freeze": "model.layers.3.*"},
            "--hft-freeze model.layers.3.* matches no unit of the model; the nearest is model.layers.2.mlp.up_proj.",
        ),
        (
            {"train": "model.norm,model.layers.0.mlp.gate.weight"},
            "--hft-train model.layers.0.mlp.gate.weight matches no unit of the model; "
            "the nearest is model.layers.0.mlp.gate_proj.",
        ),
        ({"train": "LM_HEAD"}, "--hft-train LM_HEAD matches no unit of the model; the nearest is lm_head."),
        (
            {"freeze": "lm_head.weight", "tied": True},
            "--hft-freeze lm_head.weight: the model's head is tied to its embedding; name model.embed_tokens instead.",
        ),
        (
            {"train": "model.norm,model.layers.1.*", "freeze": "*.q_proj"},
            "--hft-train model.layers.1.* and --hft-freeze *.q_proj both match model.layers.1.self_attn.q_proj, "
            "but a unit cannot always train and stay frozen; narrow one of the two.",
        ),
        (
            {"train": "model.*", "freeze_embedding": True},
            "--hft-train model.* and --hft-freeze-embedding both match model.embed_tokens, "
            "but a unit cannot always train and stay frozen; narrow one of the two.",
        ),
        (
            {"freeze": "*"},
            "--hft-ratio 0.5 with the frozen units leaves nothing to train in round 0; raise the ratio or freeze fewer "
            "units.",
        ),
        (
            {"selection": "hift", "ratio": 0.0, "freeze_embedding": True},
            "--hft-ratio 0.0 with the frozen units leaves nothing to train in round 0; raise the ratio or freeze fewer "
            "units.",
        ),
    ],
)
def test_each_mistake_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        draw(**options)
    assert str(error.value) == sentence


def test_ratio_zero_trains_what_is_left_outside_the_layers() -> None:
    assert draw(ratio=0.0, freeze_embedding=True, freeze_head=True).training == {"model.norm"}
