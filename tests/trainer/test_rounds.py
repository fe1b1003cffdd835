"""The rounds of a run: what its options may not ask of them, and plans from a file in place of drawn ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.cli import main
from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.optimizer import OptimizerConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.data.order import SampleOrder
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import make_plan
from hft_megatron.trainer.rounds import Rounds, rounds_of_run
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for
from tests.support.shapes import tiny_shape

SHAPE = tiny_shape(4)


def rounds(*, hft: dict[str, Any], optimizer: dict[str, Any] | None = None, train_iters: int = 12) -> Rounds:
    config = RunConfig(
        hft=HFTConfig(**{f"hft_{name}": value for name, value in hft.items()}),
        optimizer=OptimizerConfig(**(optimizer or {})),
        training=TrainingConfig(train_iters=train_iters),
    )
    return rounds_of_run(config, SHAPE, 1, samples=SampleOrder(num_examples=4, seed=0), loaded=(), scores=None)


@pytest.mark.parametrize(
    ("hft", "optimizer", "said"),
    [
        ({"rotation": "complementary"}, {}, "--hft-rotation complementary needs several rounds"),
        ({"moments": "carry"}, {}, "--hft-moments carry needs several rounds"),
        ({"lr_schedule": "round"}, {}, "--hft-lr-schedule round needs several rounds"),
        ({"selection": "lisa"}, {}, "--hft-selection lisa needs several rounds"),
        ({"selection": "hift"}, {}, "--hft-selection hift needs several rounds"),
        ({"selection": "hift", "round_interval": "2"}, {"lr_warmup_iters": 3}, "A warm-up of 3 iterations"),
        ({"selection": "hift", "round_interval": "2"}, {"lr_warmup_fraction": 0.5}, "A warm-up of 6 iterations"),
        (
            {"selection": "hift", "round_interval": "2", "lr_schedule": "round"},
            {},
            "--hft-lr-schedule round has no effect",
        ),
        ({"lr_schedule": "round", "round_interval": "3"}, {"lr_warmup_iters": 3}, "--lr-warmup-iters 3 must be below"),
    ],
)
def test_what_the_rounds_of_a_run_cant_keep_is_one_sentence(
    hft: dict[str, Any], optimizer: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        rounds(hft=hft, optimizer=optimizer)
    assert str(caught.value).startswith(said)


def test_a_conversion_has_no_rounds_to_keep() -> None:
    assert rounds(hft={"rotation": "complementary"}, train_iters=0).schedule.rounds == 1


def test_everything_that_some_round_trained_counts_as_trained() -> None:
    run = rounds(hft={"round_interval": "1", "ratio": 0.25})
    plans = [make_plan(SHAPE, HFTConfig(hft_ratio=0.25), default_seed=1234, round=round) for round in range(3)]
    assert run.trained_until(0) == plans[0].training
    assert run.trained_until(2) == plans[0].training | plans[1].training | plans[2].training
    assert run.plan(2) == plans[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("plans"))


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["random", "hift"])
def test_a_run_from_a_plan_file_is_the_run_that_draws_those_plans(
    selection: str, ranks: RankPools, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plans.json"
    draw = ["--hft-selection", selection, "--hft-ratio", "0.5", "--seed", "1234"]
    model = ["--load-hf", str(inputs / "model")]
    assert main(["plan", *model, *draw, "--rounds", "3", "--save", str(file)]) == 0
    capsys.readouterr()
    every_two = ["--hft-round-interval", "2", "--lr-warmup-iters", "0"]
    drawn = ranks(1).run(run_sft_words, words=words_for(inputs, *draw, *every_two))
    save = ["--save", str(tmp_path / "run"), "--load", str(tmp_path / "run")]
    from_file = words_for(inputs, "--hft-plan", file, *every_two, *save)
    first = ranks(1).run(run_sft_words, words=from_file, kill_at=3)
    second = ranks(1).run(run_sft_words, words=from_file)
    assert first[0]["steps"] + second[0]["steps"] == drawn[0]["steps"]
    assert second[0]["state"] == drawn[0]["state"]
    assert len({step["lr"] for step in drawn[0]["steps"]}) > 1
    saved = json.loads((tmp_path / "run" / "iter_0000006" / "plan.json").read_text())
    assert saved["policy"]["selection"] == selection
