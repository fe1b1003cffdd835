"""Ranking by signal-to-noise ratio. Run: pytest tests/hft/test_spectrum.py"""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hft_megatron.config.hft import HFTConfig
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan, make_plan
from hft_megatron.hft.spectrum import signal_to_noise, spectrum_scores
from hft_megatron.hft.units import units_of
from tests.support.ranks import RankPools
from tests.support.shapes import tiny_shape

SHAPE = tiny_shape(3)
MATRICES = [unit for unit in units_of(SHAPE) if unit.category in ("attention", "feed_forward")]


def draw(ratio: float, scores: dict[str, float], *, seed: int = 0, round: int = 0, rotation: Any = "fixed") -> Plan:
    config = HFTConfig(hft_ratio=ratio, hft_selection="spectrum", hft_rotation=rotation)
    return make_plan(SHAPE, config, default_seed=seed, round=round, scores=scores)


def trained(plan: Plan, category: str) -> list[str]:
    return [unit.name for unit in plan.units if unit.category == category and plan.trains(unit.name)]


@pytest.mark.parametrize("ratio", [eighth / 8 for eighth in range(9)])
def test_the_highest_scores_of_each_category_train_and_totals_are_exact(ratio: float) -> None:
    # In no order that a rule could have by accident.
    scores = {unit.name: math.sin(1000 * index) for index, unit in enumerate(MATRICES)}
    plan = draw(ratio, scores)
    for category in ("attention", "feed_forward"):
        names = [unit.name for unit in MATRICES if unit.category == category]
        count = int(ratio * len(names) + 0.5)
        assert set(trained(plan, category)) == set(sorted(names, key=scores.__getitem__, reverse=True)[:count])
    assert len(trained(plan, "norm")) == int(ratio * 6 + 0.5)


def test_equal_scores_go_by_canonical_order_and_infinite_ones_come_first() -> None:
    equal = {unit.name: 1.0 for unit in MATRICES}
    first_six = [unit.name for unit in MATRICES if unit.category == "attention"][:6]
    assert trained(draw(0.5, equal), "attention") == first_six
    last = "model.layers.2.self_attn.o_proj"
    assert trained(draw(0.5, {**equal, last: math.inf}), "attention") == [*first_six[:5], last]


def test_rounds_change_only_under_complementary_rotation_and_seeds_only_the_norms() -> None:
    scores = {unit.name: float(unit.parameters) for unit in MATRICES}
    for rotation in ("independent", "fixed"):
        assert len({draw(0.5, scores, round=round, rotation=rotation).training for round in range(5)}) == 1
    rounds = [draw(0.5, scores, round=round, rotation="complementary").training for round in (0, 1)]
    assert rounds[0] ^ rounds[1] == {unit.name for unit in units_of(SHAPE) if unit.layer is not None}
    plans = [draw(0.5, scores, seed=seed) for seed in range(5)]
    assert len({tuple(trained(plan, "attention")) for plan in plans}) == 1
    assert len({tuple(trained(plan, "norm")) for plan in plans}) > 1


@pytest.mark.parametrize(
    ("rows", "columns", "values", "score"),
    [
        # Quartiles 0.95 and 3.4, so sigma is 1.816 and the threshold of a square matrix 3.632: 10 over 1.2 + 1 + 0.8.
        (4, 4, [10, 1.2, 1, 0.8], 10 / 3 / 10),
        # Quartiles 5.75 and 15.25; the threshold is 7.042 x 1.5 and not, with the sides exchanged, 7.042 x 3.
        (2, 8, [20, 1], 1.0),
        (8, 2, [20, 1], 1.0),
        # Quartiles 1.75 and 3.25, threshold 2.224: 4 + 3 over 2 + 1.
        (4, 4, [4, 3, 2, 1], 7 / 3 / 4),
        (3, 3, [5, 5, 5], math.inf),
        (3, 3, [0, 0, 0], 0.0),
    ],
)
def test_the_score_is_signal_over_noise_over_the_largest_singular_value(
    rows: int, columns: int, values: list[float], score: float
) -> None:
    weight = torch.zeros(rows, columns)
    weight[range(len(values)), range(len(values))] = torch.tensor(values, dtype=torch.float32)
    assert signal_to_noise(weight) == pytest.approx(score, rel=1e-5)
    assert signal_to_noise(weight.flip(0).bfloat16()) == pytest.approx(score, rel=0.01)


def test_a_matrix_of_low_rank_and_noise_scores_higher_than_noise_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 48, generator=generator)
    signal = torch.randn(64, 8, generator=generator) @ torch.randn(8, 48, generator=generator)
    largest = float(torch.linalg.matrix_norm(noise, 2))
    mixed = signal + noise
    # Scores fall with the scale of a matrix, so both get the same largest singular value.
    assert signal_to_noise(mixed * largest / float(torch.linalg.matrix_norm(mixed, 2))) > signal_to_noise(noise)


def run_scoring(broken_rank: int | None, trouble: str) -> dict[str, Any]:
    """Score on every rank, where one rank's first matrix is broken; what was read here, and the scores or the error."""
    read: list[str] = []

    def matrix(name: str) -> Tensor:
        read.append(name.removesuffix(".weight"))
        index = [unit.name for unit in MATRICES].index(read[-1])
        weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(index))
        if dist.get_rank() == broken_rank and len(read) == 1:
            if trouble == "unreadable":
                raise UserError(f"{read[-1]} cannot be read")
            weight[3, 2] = float(trouble)
        return weight

    error = None
    scores: dict[str, float] = {}
    try:
        scores = spectrum_scores(SHAPE, matrix, device=torch.device("cpu"))
    except UserError as raised:
        error = str(raised)
    dist.barrier()
    return {"read": read, "scores": scores, "error": error}


def test_ranks_share_the_matrices_evenly_and_hold_the_same_scores(ranks: RankPools) -> None:
    first, second = ranks(2).run(run_scoring, broken_rank=None, trouble="")
    assert sorted(first["read"] + second["read"]) == sorted(unit.name for unit in MATRICES)
    sizes = {unit.name: unit.parameters for unit in MATRICES}
    loads = [sum(sizes[name] for name in rank["read"]) for rank in (first, second)]
    assert abs(loads[0] - loads[1]) <= max(sizes.values())
    assert first["scores"] == second["scores"]
    assert first["scores"].keys() == sizes.keys()
    assert len(set(first["scores"].values())) == len(sizes)


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        ("unreadable", r"^model\.layers\..* cannot be read$"),
        (
            "nan",
            r"^--hft-selection spectrum: model\.layers\..* in the --load-hf folder has infinite or undefined entries",
        ),
        (
            "inf",
            r"^--hft-selection spectrum: model\.layers\..* in the --load-hf folder has infinite or undefined entries",
        ),
    ],
)
def test_a_matrix_that_one_rank_cannot_score_stops_all_ranks_with_one_sentence(
    trouble: str, sentence: str, ranks: RankPools
) -> None:
    first, second = ranks(2).run(run_scoring, broken_rank=1, trouble=trouble)
    assert first["error"] == second["error"]
    with pytest.raises(UserError, match=sentence):
        raise UserError(first["error"])
