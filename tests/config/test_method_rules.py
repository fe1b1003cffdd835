"""Options of the method that contradict each other. Run: pytest tests/config/test_method_rules.py"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.hft import METHOD_RULES, HFTConfig
from hft_megatron.config.model import ModelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.errors import UserError
from tests.support.shapes import tiny_shape

BASE = RunConfig(model=ModelConfig(load_hf="model"))
COMPLEMENTARY = "complementary"


def check(*, tied: bool = False, base: RunConfig = BASE, **options: Any) -> None:
    config = replace(base, hft=HFTConfig(**{f"hft_{name}": value for name, value in options.items()}))
    for rule in METHOD_RULES:
        rule(config, tiny_shape(4, tied=tied), 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": 0.0},
        {"level": "layer", "counting": "parameters", "rotation": COMPLEMENTARY},
        {"level": "model", "counting": "parameters", "rotation": "fixed"},
        {"pairing": COMPLEMENTARY, "counting": "parameters", "rotation": COMPLEMENTARY},
        {"selection": "spectrum", "rotation": COMPLEMENTARY},
        {"selection": "lisa", "round_interval": "20"},
        {"selection": "hift", "ratio": 0.1, "round_interval": "epoch"},
        {"moments": "carry", "frozen_moments": "host", "round_interval": "1"},
        {"audit": True, "audit_interval": 5},
        {"train": "model.norm, *.q_proj", "freeze": "*.0.*"},
        {"freeze_embedding": True},
        {"freeze_embedding": True, "freeze_head": True, "tied": True},
    ],
    ids=str,
)
def test_what_goes_together_passes(options: dict[str, Any]) -> None:
    check(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"pairing": COMPLEMENTARY, "ratio": 0.25},
            "--hft-pairing complementary needs --hft-ratio 0.5, but it is 0.25",
        ),
        (
            {"rotation": COMPLEMENTARY, "ratio": 0.6},
            "--hft-rotation complementary needs --hft-ratio 0.5, but it is 0.6",
        ),
        (
            {"pairing": COMPLEMENTARY, "level": "layer"},
            "--hft-pairing complementary pairs the draws of single layers, but --hft-level layer has none",
        ),
        ({"selection": "lisa", "level": "layer"}, "--hft-level layer has no effect with --hft-selection lisa"),
        (
            {"selection": "hift", "rotation": "fixed"},
            "--hft-rotation fixed has no effect with --hft-selection hift, which takes one group of layers",
        ),
        ({"selection": "hift", "counting": "parameters"}, "--hft-counting parameters has no effect"),
        (
            {"selection": "spectrum", "pairing": COMPLEMENTARY},
            "--hft-pairing complementary has no effect with --hft-selection spectrum",
        ),
        (
            {"selection": "spectrum", "base": RunConfig()},
            "--hft-selection spectrum ranks the matrices of a trained model; give its folder with --load-hf.",
        ),
        (
            {"tied": True, "freeze_embedding": True},
            "--hft-freeze-embedding cannot be used alone: the model's embedding and head are tied and so one weight; "
            "add --hft-freeze-head, or leave --hft-freeze-embedding out.",
        ),
        ({"tied": True, "freeze_head": True}, "--hft-freeze-head cannot be used alone"),
        ({"train": "a,,b"}, "--hft-train 'a,,b' has an empty pattern"),
        ({"freeze": ""}, "--hft-freeze '' has an empty pattern"),
        ({"round_interval": "0"}, "--hft-round-interval 0 must be stage, epoch, or a number of iterations"),
        ({"round_interval": "Epoch"}, "--hft-round-interval Epoch must be"),
        ({"round_interval": "-5"}, "--hft-round-interval -5 must be"),
        ({"round_interval": "1.5"}, "--hft-round-interval 1.5 must be"),
        ({"frozen_moments": "host"}, "--hft-frozen-moments host needs --hft-moments carry"),
        ({"audit_interval": 5}, "--hft-audit-interval 5 needs --hft-audit"),
        ({"plan": "absent.json"}, "--hft-plan absent.json is not a readable file"),
    ],
)
def test_each_contradiction_is_one_sentence_that_names_the_option(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        check(**options)
    assert str(error.value).startswith(sentence)
    assert str(error.value).count(". ") == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ratio": 0.25}, "--hft-ratio 0.25"),
        ({"level": "layer"}, "--hft-level layer"),
        ({"selection": "lisa"}, "--hft-selection lisa"),
        ({"counting": "parameters"}, "--hft-counting parameters"),
        ({"pairing": COMPLEMENTARY}, "--hft-pairing complementary"),
        ({"rotation": "fixed"}, "--hft-rotation fixed"),
        ({"seed": 7}, "--hft-seed 7"),
        ({"freeze_embedding": True}, "--hft-freeze-embedding"),
        ({"freeze_head": True}, "--hft-freeze-head"),
        ({"train": "*"}, "--hft-train *"),
        ({"freeze": "*"}, "--hft-freeze *"),
    ],
)
def test_a_plan_file_leaves_no_room_for_options_of_the_draw(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="is an option of the draw, but --hft-plan") as error:
        check(plan=str(path), **options)
    assert str(error.value).startswith(f"{named} is an option")


def test_a_plan_file_goes_with_rounds_moments_audit_and_the_seed_that_a_resolved_config_holds(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{}")
    base = replace(BASE, training=TrainingConfig(seed=7))
    check(base=base, plan=str(path), seed=7, round_interval="5", moments="carry", audit=True)
