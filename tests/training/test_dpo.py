"""Preference tuning equals a plain PyTorch loop over transformers at every layout, with each kind of reference.

Run: pytest tests/training/test_dpo.py
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.config.schema import HFTConfig
from hft_megatron.data.order import SampleOrder
from hft_megatron.data.packing import PackedOrder, PackingRule
from hft_megatron.hft.plan import make_plan
from hft_megatron.objectives.dpo import PreferenceRule
from tests.support.models import LAYOUTS
from tests.support.preferences import flags, pairs_of, plain_dpo, words_for_pairs
from tests.support.ranks import RankPools
from tests.support.runs import run_method_words
from tests.support.tiers import quick

STEPS = 20
SEED = 1234
TOLERANCE = 1e-5
"""Relative, of losses and gradient norms. The promise is 1e-4."""
NEAR_ZERO = 2e-7
"""The loss of IPO is the square of a small difference once it has learned; losses begin near 1."""


@pytest.fixture(scope="module")
def references(pairs_folder: Path):
    """``references(packed, rule)``: the plain loop's steps."""

    def train(packed: bool, rule: PreferenceRule) -> list[dict[str, float]]:
        folder, pairs = str(pairs_folder / "model"), pairs_of(pairs_folder)
        plan = make_plan(ModelShape.from_hf_config(load_hf_config(folder), folder), HFTConfig(), default_seed=SEED)
        order = SampleOrder(num_examples=len(pairs), seed=SEED)
        if not packed:
            return plain_dpo(pairs_folder, plan, order, rule, STEPS)
        lengths = pairs.answers.lengths.astype("int64").reshape(-1, 2).sum(axis=1) - 2
        packing = PackingRule(capacity=192, algorithm="first_fit_decreasing", window=4096)
        return plain_dpo(pairs_folder, plan, PackedOrder(order, lengths, packing), rule, STEPS)

    return lru_cache(train)


SIGMOID = PreferenceRule(beta=0.5)
CASES: dict[str, tuple[int, list[str], PreferenceRule]] = {
    "tp1 micro-batch 4": (1, ["--micro-batch-size", "4"], SIGMOID),
    "tp1 micro-batch 1": (1, [], SIGMOID),
    "tp2": (2, flags(LAYOUTS["tp2"]), SIGMOID),
    "tp2 sp": (2, [*flags(LAYOUTS["tp2_sp"]), "--micro-batch-size", "4"], SIGMOID),
    "pp2": (2, flags(LAYOUTS["pp2"]), SIGMOID),
    "pp2 interleaved": (2, [*flags(LAYOUTS["pp2_vpp"]), "--micro-batch-size", "2"], SIGMOID),
    "dp2": (2, ["--overlap-grad-reduce", "--overlap-param-gather"], SIGMOID),
    "packed": (1, ["--packing"], SIGMOID),
    "packed micro-batch 4": (1, ["--packing", "--micro-batch-size", "4"], SIGMOID),
    "packed tp2 sp": (2, [*flags(LAYOUTS["tp2_sp"]), "--packing"], SIGMOID),
    "packed pp2": (2, [*flags(LAYOUTS["pp2"]), "--packing", "--micro-batch-size", "2"], SIGMOID),
    "packed dp2": (2, ["--packing"], SIGMOID),
    "recompute": (
        1,
        [
            *("--recompute-granularity", "full", "--recompute-method", "uniform"),
            *("--recompute-num-layers", "1", "--micro-batch-size", "4"),
        ],
        SIGMOID,
    ),
    "smoothed": (1, ["--dpo-label-smoothing", "0.1"], PreferenceRule(beta=0.5, label_smoothing=0.1)),
    "hinge": (1, ["--dpo-loss", "hinge"], PreferenceRule(beta=0.5, loss="hinge")),
    "ipo": (1, ["--dpo-loss", "ipo"], PreferenceRule(beta=0.5, loss="ipo", average_log_probs=True)),
    "sft term": (1, ["--dpo-sft-weight", "0.3"], PreferenceRule(beta=0.5, sft_weight=0.3)),
    "averaged": (1, ["--dpo-average-log-probs"], PreferenceRule(beta=0.5, average_log_probs=True)),
}
QUICK = ["tp1 micro-batch 4", "tp2 sp", "pp2 interleaved"]


@pytest.mark.parametrize("case", quick(CASES, QUICK))
def test_twenty_steps_equal_a_plain_pytorch_loop_at_every_layout(
    ranks: RankPools, pairs_folder: Path, references: Any, case: str
) -> None:
    world_size, options, rule = CASES[case]
    expected = references("--packing" in options, rule)
    values = ranks(world_size).run(run_method_words, method="dpo", words=words_for_pairs(pairs_folder, *options))
    steps = values[-1]["steps"]
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.01, "agreement means little where nothing is learned"
    losses = [step["loss"] for step in expected]
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=TOLERANCE, abs=NEAR_ZERO)
    norms = [step["grad_norm"] for step in expected]
    assert [step["grad_norm"] for step in steps] == pytest.approx(norms, rel=TOLERANCE, abs=NEAR_ZERO)
    for name in ("rewards/chosen", "rewards/rejected"):
        seen = [step["measured"][name] for step in steps]
        assert seen == pytest.approx([step[name] for step in expected], rel=TOLERANCE, abs=1e-5)
    if rule == SIGMOID:
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
