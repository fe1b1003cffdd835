"""The comparison of logits finds what differs. Run: pytest tests/conversion/test_logits_check.py"""

from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.conversion import logits_check
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from tests.support.models import make_llama
from tests.support.ranks import RankPools


def run_compare(folder: str, factor: float, wrong_unit: str, rounded_to: str) -> tuple[bool, float, str]:
    """Compares a folder with itself, one unit's weights multiplied by ``factor`` on our side."""
    shape = ModelShape.from_hf_config(load_hf_config(folder), folder)
    with HuggingFaceWeights(folder) as weights, patch.object(logits_check, "stop_groups", lambda: None):

        def read(unit: str) -> Tensor:
            return weights.read(f"{unit}.weight") * (factor if unit == wrong_unit else 1.0)

        difference = logits_check.compare_logits(folder, shape, read, rounded_to=getattr(torch, rounded_to))
    return difference.is_within, difference.largest, difference.describe()


def test_one_wrong_matrix_is_found_and_rounding_is_not_an_error(ranks: RankPools, tmp_path: Path) -> None:
    folder = str(make_llama(tmp_path, "llama3_rope", torch.bfloat16))
    unit = "model.layers.2.self_attn.k_proj"
    [(within, largest, said)] = ranks(1).run(
        run_compare, folder=folder, factor=1.0, wrong_unit=unit, rounded_to="float32"
    )
    assert within, said
    assert largest < 1e-4
    [(within, wrong, said)] = ranks(1).run(
        run_compare, folder=folder, factor=1.1, wrong_unit=unit, rounded_to="float32"
    )
    assert not within, said
    assert wrong > 100 * largest
    [(within, _, said)] = ranks(1).run(run_compare, folder=folder, factor=1.002, wrong_unit=unit, rounded_to="bfloat16")
    assert within, said
    assert "tolerance 0.05" in said


def test_a_logit_that_is_no_number_is_not_within(ranks: RankPools, tmp_path: Path) -> None:
    [(within, _, said)] = ranks(1).run(
        run_compare,
        folder=str(make_llama(tmp_path)),
        factor=float("nan"),
        wrong_unit="model.norm",
        rounded_to="bfloat16",
    )
    assert not within, said
