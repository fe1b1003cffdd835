import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan, make_plan

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=4,
    vocab_size=11,
    max_position_embeddings=16,
)
PLAN = make_plan(SHAPE, HFTConfig(), default_seed=1234)
GOLDEN_TRAINING = [
    "lm_head",
    "model.embed_tokens",
    "model.layers.0.input_layernorm",
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.self_attn.o_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.1.mlp.gate_proj",
    "model.layers.1.post_attention_layernorm",
    "model.layers.1.self_attn.k_proj",
    "model.layers.1.self_attn.o_proj",
    "model.norm",
]
GOLDEN_DIGEST = "471498e9484742be9f94dddcd9f6bd1a881786c23c39e0cc87e1d36f9b421273"


def flip(plan: Plan, name: str) -> Plan:
    return replace(plan, training=plan.training ^ {name})


def test_the_plan_of_a_known_seed_is_the_same_on_every_machine() -> None:
    # The names were found with sha256sum and sort, not with this code.
    assert sorted(PLAN.training) == GOLDEN_TRAINING
    assert PLAN.digest == GOLDEN_DIGEST


def test_the_hft_seed_overrides_the_default_seed() -> None:
    assert make_plan(SHAPE, HFTConfig(hft_seed=7), default_seed=1) == make_plan(SHAPE, HFTConfig(), default_seed=7)


def test_seed_round_and_ratio_each_change_the_digest() -> None:
    others = [
        make_plan(SHAPE, HFTConfig(), default_seed=1235),
        make_plan(SHAPE, HFTConfig(), default_seed=1234, round=1),
        make_plan(SHAPE, HFTConfig(hft_ratio=0.51), default_seed=1234),
        flip(PLAN, "model.layers.1.mlp.up_proj"),
    ]
    assert len({plan.digest for plan in [PLAN, *others]}) == 5


def test_an_integer_ratio_gives_the_digest_of_the_float() -> None:
    assert make_plan(SHAPE, HFTConfig(hft_ratio=1), default_seed=0).digest == (
        make_plan(SHAPE, HFTConfig(hft_ratio=1.0), default_seed=0).digest
    )


def test_trains_knows_only_units_of_the_model() -> None:
    assert PLAN.trains("lm_head")
    with pytest.raises(AssertionError, match="input_layernorm is not a unit"):
        PLAN.trains("model.layers.2.input_layernorm")


def test_json_round_trip_is_the_identity_and_canonical() -> None:
    text = PLAN.to_json()
    again = Plan.from_json(text, shape=SHAPE, source="plan.json")
    assert again == PLAN
    assert again.digest == PLAN.digest
    assert again.to_json() == text
    assert Plan.from_json(json.dumps(json.loads(text), indent=1), shape=SHAPE, source="plan.json") == PLAN
    assert len([line for line in text.splitlines() if '"trains": ' in line]) == len(PLAN.units)


def test_an_edited_plan_trains_what_was_edited() -> None:
    name = "model.layers.1.self_attn.k_proj"
    record = json.loads(PLAN.to_json())
    for row in record["units"]:
        if row["name"] == name:
            row["trains"] = not row["trains"]
    edited = Plan.from_json(json.dumps(record), shape=SHAPE, source="plan.json")
    assert edited == flip(PLAN, name)


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.mlp.down_proj", "lm_head"])
def test_the_first_difference_is_the_unit_that_was_tampered_with(name: str) -> None:
    assert PLAN.first_difference(flip(PLAN, name)) == name
    assert flip(PLAN, name).first_difference(PLAN) == name


def test_the_first_difference_of_two_is_the_first_in_canonical_order() -> None:
    tampered = flip(flip(PLAN, "model.norm"), "model.layers.0.mlp.gate_proj")
    assert PLAN.first_difference(tampered) == "model.layers.0.mlp.gate_proj"


def test_equal_plans_have_no_difference_and_equal_sets_differ_in_the_option() -> None:
    assert PLAN.first_difference(replace(PLAN)) is None
    assert PLAN.first_difference(replace(PLAN, policy=replace(PLAN.policy, seed=99))) == "seed"
    assert PLAN.first_difference(replace(PLAN, round=4)) == "round"


def test_plans_of_different_models_differ_in_the_first_unit_that_is_not_in_both() -> None:
    everything = HFTConfig(hft_ratio=1.0)
    tied = make_plan(replace(SHAPE, tie_embeddings=True), everything, default_seed=0)
    untied = make_plan(SHAPE, everything, default_seed=0)
    assert untied.first_difference(tied) == tied.first_difference(untied) == "lm_head"
    wide = make_plan(replace(SHAPE, ffn_hidden_size=17), everything, default_seed=0)
    assert untied.first_difference(wide) == "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (replace(SHAPE, num_layers=1), "lists model.layers.1.self_attn.q_proj, which the model does not have"),
        (replace(SHAPE, num_layers=3), "does not list model.layers.2.self_attn.q_proj"),
        (replace(SHAPE, tie_embeddings=True), "lists lm_head, which the model does not have"),
        (
            replace(SHAPE, num_query_groups=2),
            r"model.layers.0.self_attn.k_proj is .* 32 parameters, but the model's is .* 64 ",
        ),
        (replace(SHAPE, vocab_size=12), "model.embed_tokens is embedding with 88 parameters"),
    ],
)
def test_a_plan_of_another_model_is_refused_by_unit_name(shape: ModelShape, message: str) -> None:
    with pytest.raises(UserError, match=rf"^my\.json does not fit the model: .*{message}"):
        Plan.from_json(PLAN.to_json(), shape=shape, source="my.json")


def edit(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda record: record.update(fields)


def edit_policy(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda record: record["policy"].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(format=1), "plan format 1, but this version reads 2"),
        (edit(policy=1), "policy 1, which is of the wrong type"),
        (edit(policy={}), "a policy with exactly the fields ratio, level, selection"),
        (edit_policy(ratio=1.5), r"the policy's ratio 1\.5 is not valid"),
        (edit_policy(ratio=float("nan")), "the policy's ratio nan is not valid"),
        (edit_policy(ratio="half"), "the policy's ratio 'half' is not valid"),
        (edit_policy(seed=True), "the policy's seed True is not valid"),
        (edit_policy(selection="lottery"), "the policy's selection 'lottery' is not valid"),
        (edit_policy(level=["category"]), r"the policy's level \['category'\] is not valid"),
        (edit_policy(freeze_head=0), "the policy's freeze_head 0 is not valid"),
        (edit_policy(train="*"), r"the policy's train '\*' is not valid"),
        (edit(rounds=[]), r"rounds \[\], which must be a list of round numbers"),
        (edit(rounds=[True]), r"rounds \[True\], which must be"),
        (edit(rounds=[0, 1]), r"`trains` true for model.embed_tokens; it must be a list of 2"),
        (edit(shape_fingerprint="0"), "edited shape_fingerprint"),
        (edit(colour="red"), "check colour"),
        (lambda record: record.pop("rounds"), "check rounds"),
        (lambda record: record["units"][3].update(trains="yes"), r"units\[3\] has trains 'yes'"),
        (lambda record: record["units"][3].update(category="mlp"), "v_proj is mlp of layer 0"),
        (lambda record: record["units"].append(record["units"][5]), "lists model.layers.0.mlp.gate_proj twice"),
        (lambda record: record["units"].reverse(), "lm_head is out of order"),
        (lambda record: [row.update(trains=False) for row in record["units"]], "freezes every unit"),
    ],
)
def test_a_malformed_plan_is_refused_in_one_sentence(change: Callable[[dict[str, Any]], object], message: str) -> None:
    record = json.loads(PLAN.to_json())
    change(record)
    with pytest.raises(UserError, match=message):
        Plan.from_json(json.dumps(record), shape=SHAPE, source="my.json")


def test_text_that_is_not_json_is_refused_by_line() -> None:
    broken = PLAN.to_json().replace('"units": [', '"units": ', 1)
    with pytest.raises(UserError, match=r"^my\.json:\d+ is not JSON"):
        Plan.from_json(broken, shape=SHAPE, source="my.json")


def test_counts_add_up_and_half_is_half_by_parameters_without_grouped_queries() -> None:
    shape = replace(SHAPE, num_query_groups=2, num_layers=4)
    plan = make_plan(shape, HFTConfig(), default_seed=5)
    by_category = {count.category: count for count in plan.counts()}
    assert [by_category[c].unit_ratio for c in ("attention", "feed_forward", "norm")] == [0.5, 0.5, 0.5]
    assert [by_category[c].parameter_ratio for c in ("attention", "feed_forward", "norm")] == [0.5, 0.5, 0.5]
    assert sum(count.parameters for count in plan.counts()) == plan.trainable_parameters + plan.frozen_parameters
    assert sum(count.training_parameters for count in plan.counts()) == plan.trainable_parameters
    assert by_category["feed_forward"].training_units == 6


def test_the_description_has_one_line_per_category_and_the_short_digest() -> None:
    lines = PLAN.describe().splitlines()
    assert PLAN.short_digest in lines[0]
    assert [line.split()[0] for line in lines[1:]] == [
        "attention",
        "feed_forward",
        "norm",
        "embedding",
        "final_norm",
        "lm_head",
    ]
    assert "4 of 8 units train (50.0%)" in lines[1]


def test_a_plan_of_70b_is_drawn_and_described_in_well_under_a_second() -> None:
    shape = ModelShape(
        num_layers=80,
        hidden_size=8192,
        ffn_hidden_size=28672,
        num_attention_heads=64,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    start = time.process_time()
    make_plan(shape, HFTConfig(), default_seed=1).describe()
    assert time.process_time() - start < 0.5
