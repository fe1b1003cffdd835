"""Plan files of several rounds, as a person edits them. Run: pytest tests/hft/test_plan_file.py"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.hft import HFTConfig
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan, make_plan
from hft_megatron.hft.plan_file import check_enough_rounds, load_plans, plans_to_json
from tests.support.shapes import tiny_shape

SHAPE = tiny_shape(2)
CONFIG = HFTConfig(hft_rotation="complementary", hft_train="*.0.mlp.up_proj", hft_freeze_head=True)
PLANS = tuple(make_plan(SHAPE, CONFIG, default_seed=3, round=round) for round in range(3))
UNIT = "model.layers.1.mlp.up_proj"


def save(folder: Path, text: str) -> str:
    path = folder / "plan.json"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_plans_come_back_from_their_file_with_their_digests(rounds: int, tmp_path: Path) -> None:
    loaded = load_plans(save(tmp_path, plans_to_json(PLANS[:rounds])), SHAPE)
    assert loaded == PLANS[:rounds]
    assert [plan.digest for plan in loaded] == [plan.digest for plan in PLANS[:rounds]]
    assert plans_to_json(loaded) == plans_to_json(PLANS[:rounds])


def test_every_unit_has_one_line_with_its_rounds() -> None:
    [line] = [line for line in plans_to_json(PLANS).splitlines() if f'"{UNIT}"' in line]
    assert json.loads(line.rstrip(","))["trains"] == [plan.trains(UNIT) for plan in PLANS]
    assert len(plans_to_json(PLANS).splitlines()) == len(PLANS[0].units) + 8


def test_a_file_of_one_round_is_the_plan_of_a_checkpoint_and_starts_a_run_from_round_zero(tmp_path: Path) -> None:
    assert plans_to_json(PLANS[2:]) == PLANS[2].to_json()
    assert load_plans(save(tmp_path, PLANS[2].to_json()), SHAPE) == (replace(PLANS[2], round=0),)


def test_an_edited_line_changes_that_unit_in_that_round_alone(tmp_path: Path) -> None:
    values = json.dumps([plan.trains(UNIT) for plan in PLANS])
    edited = json.dumps([PLANS[0].trains(UNIT), not PLANS[1].trains(UNIT), PLANS[2].trains(UNIT)])
    lines = plans_to_json(PLANS).splitlines()
    lines = [line.replace(values, edited) if f'"{UNIT}"' in line else line for line in lines]
    loaded = load_plans(save(tmp_path, "\n".join(lines)), SHAPE)
    assert loaded == (PLANS[0], replace(PLANS[1], training=PLANS[1].training ^ {UNIT}), PLANS[2])


def trains(value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda record: record["units"][3].update(trains=value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            trains([True, False]),
            "has `trains` [true, false] for model.layers.0.self_attn.v_proj; it must be a list of 3",
        ),
        (trains(True), "has `trains` true for model.layers.0.self_attn.v_proj; it must be a list of 3"),
        (trains([True, 0, True]), "has `trains` [true, 0, true] for model.layers.0.self_attn.v_proj"),
        (
            lambda record: record["units"].pop(3),
            "does not fit the model: it does not list model.layers.0.self_attn.v_proj",
        ),
        (
            lambda record: [row["trains"].__setitem__(1, False) for row in record["units"]],
            "freezes every unit in round 1, so nothing would train",
        ),
        (lambda record: record.update(rounds=[0, 1, "2"]), "has rounds [0, 1, '2'], which must be a list of round"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_unit_name(
    change: Callable[[dict[str, Any]], object], sentence: str, tmp_path: Path
) -> None:
    record = json.loads(plans_to_json(PLANS))
    change(record)
    path = save(tmp_path, json.dumps(record))
    with pytest.raises(UserError) as error:
        load_plans(path, SHAPE)
    assert str(error.value).startswith(f"{path} {sentence}")


def test_a_file_of_another_model_or_none_at_all_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, plans_to_json(PLANS))
    with pytest.raises(UserError, match=r"lists model\.layers\.1\.self_attn\.q_proj, which the model does not have"):
        load_plans(path, tiny_shape(1))
    with pytest.raises(UserError, match=r"^--hft-plan .*/absent\.json cannot be read \(No such file"):
        load_plans(f"{tmp_path}/absent.json", SHAPE)


def test_a_file_of_several_rounds_is_not_the_plan_of_a_checkpoint() -> None:
    with pytest.raises(UserError, match=r"^plan\.json has the plans of 3 rounds, but must have one"):
        Plan.from_json(plans_to_json(PLANS), shape=SHAPE, source="plan.json")


def test_a_file_shorter_than_the_run_is_refused_with_both_numbers() -> None:
    check_enough_rounds(PLANS, 3, "plan.json")
    with pytest.raises(UserError, match=r"^--hft-plan plan\.json has 3 rounds, but the run needs 4; "):
        check_enough_rounds(PLANS, 4, "plan.json")
