"""Packed runs stop and resume at the exact pack, at any layout; epochs are a length of a run.

Run: pytest tests/trainer/test_packed_runs.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.data import DataConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.data.order import PackedOrder, PackingRule
from hft_megatron.data.tokenizer_loading import load_tokenizer
from tests.support.data_files import load
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for
from tests.support.tiers import quick

PACKING = ["--packing", "--packing-window", "10", "--seq-length", "128", "--lr-decay-style", "constant"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def of_steps(values: list[dict[str, Any]], name: str) -> list[Any]:
    return [step[name] for step in values[-1]["steps"]]


def epoch_starts(inputs: Path) -> Sequence[int]:
    """Packs before each epoch of a run with PACKING."""
    dataset = load(inputs / "data.jsonl", load_tokenizer(None, inputs / "model"), 128)
    rule = PackingRule(capacity=128, algorithm=DataConfig().packing_algorithm, window=10)
    return PackedOrder(dataset.order(TrainingConfig().seed), dataset.lengths - 1, rule).epoch_starts(24)


@pytest.mark.slow
def test_a_packed_run_resumes_within_an_epoch_at_another_layout_with_the_same_packs(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    words = words_for(inputs, *PACKING)
    saved = [*words, "--save", str(tmp_path), "--load", str(tmp_path)]
    whole = ranks(2).run(run_sft_words, words=words)
    starts = epoch_starts(inputs)
    assert starts[1] < 12 < starts[2]  # so the 12 packs of three steps end within an epoch
    ranks(2).run(run_sft_words, words=[*saved, "--train-iters", "3"])
    elsewhere = ranks(1).run(
        run_sft_words, words=[*words, "--load", str(tmp_path), "--save", str(tmp_path), "--micro-batch-size", "4"]
    )
    assert of_steps(elsewhere, "consumed") == of_steps(whole, "consumed")[3:] == [16, 20, 24]
    assert of_steps(elsewhere, "loss") == pytest.approx(of_steps(whole, "loss")[3:], rel=1e-5)


def test_the_losses_of_a_packed_run_resume_to_the_last_bit(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    words = words_for(inputs, *PACKING, "--micro-batch-size", 2)
    saved = [*words, "--save", str(tmp_path), "--load", str(tmp_path)]
    whole = ranks(2).run(run_sft_words, words=words)
    first = ranks(2).run(run_sft_words, words=[*saved, "--train-iters", "3"])
    second = ranks(2).run(run_sft_words, words=saved)
    for rank in range(2):
        assert first[rank]["steps"] + second[rank]["steps"] == whole[rank]["steps"]
        assert second[rank]["state"] == whole[rank]["state"]


@pytest.mark.parametrize("packing", quick([True, False], [True]))
def test_a_run_of_epochs_has_their_iterations_and_its_rounds_are_epochs(
    ranks: RankPools, inputs: Path, tmp_path: Path, packing: bool
) -> None:
    words = words_for(inputs, *(PACKING if packing else []), "--hft-round-interval", "epoch", "--save", tmp_path)
    words = [word for word, before in zip(words, ["", *words], strict=False) if "--train-iters" not in (word, before)]
    [done] = ranks(1).run(run_sft_words, words=[*words, "--train-epochs", "2"])
    assert "train_epochs: null" in (tmp_path / "resolved_config.yaml").read_text()
    iterations = len(done["steps"])
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rounds = [record["round"] for record in records if "round" in record]
    assert set(rounds) == {0, 1}
    assert len(rounds) == iterations
    if packing:
        assert 4 <= iterations <= 6
    else:
        assert (iterations, rounds) == (12, [0] * 6 + [1] * 6)
