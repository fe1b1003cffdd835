"""Options of preference tuning that contradict each other. Run: pytest tests/config/test_dpo_rules.py"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.adapters import Adapters
from hft_megatron.config.data import DataConfig
from hft_megatron.config.dpo import DPO_RULES, DpoConfig, note_unused_cache, reference_is_clear
from hft_megatron.config.model import ModelConfig
from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.config.run import RunConfig
from hft_megatron.errors import UserError
from tests.support.models import make_llama
from tests.support.shapes import tiny_shape


def check(data: dict[str, Any] | None = None, **options: Any) -> None:
    dpo = DpoConfig(**{f"dpo_{name}": value for name, value in options.items()})
    config = RunConfig(model=ModelConfig(load_hf="model"), data=DataConfig(**data or {}), dpo=dpo)
    for rule in DPO_RULES:
        rule(config, tiny_shape(4), 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"loss": "ipo", "average_log_probs": False},
        {"sft_weight": 1.0, "reference": "shared"},
        {"reference_cache": "somewhere/new"},
        {"reference_cache": "c", "reference": "shared"},
        {"reference_cache": __file__, "reference": "model"},
        {"data": {"data_format": "preference", "long_examples": "truncate", "loss_on": "last"}},
    ],
)
def test_options_that_go_together_are_accepted(options: dict[str, Any]) -> None:
    check(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"label_smoothing": 0.1, "loss": "ipo"}, "defined for --dpo-loss sigmoid and not for ipo"),
        ({"reference_model": "m", "reference": "shared"}, "--dpo-reference shared shares the frozen weights"),
        ({"reference_cache": __file__}, "is a file, not a folder"),
        ({"data": {"data_format": "messages"}}, "--data-format messages has no pairs"),
        ({"data": {"loss_on": "all"}}, "--loss-on all would also compare the prompts"),
        ({"data": {"long_examples": "split"}}, "--long-examples split would cut an answer from its prompt"),
    ],
)
def test_a_contradiction_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check(**options)


def test_a_reference_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    folder = str(make_llama(tmp_path / "other"))
    with pytest.raises(UserError, match=f"--dpo-reference-model {folder} has another shape than --load-hf model"):
        check(reference_model=folder)
    same = ModelShape.from_hf_config(load_hf_config(folder), folder)
    config = RunConfig(model=ModelConfig(load_hf="model"), dpo=DpoConfig(dpo_reference_model=folder))
    for shape in (same, replace(same, adapters=Adapters(rank=4, alpha=8.0, targets=("q_proj",)))):
        reference_is_clear(config, shape, 1)


def test_a_cache_that_another_kind_of_reference_leaves_alone_is_a_line() -> None:
    assert note_unused_cache(DpoConfig(dpo_reference_cache="c", dpo_reference="precompute")) == []
    assert note_unused_cache(DpoConfig(dpo_reference="shared")) == []
    for kind in ("shared", "model"):
        [line] = note_unused_cache(DpoConfig(dpo_reference_cache="c", dpo_reference=kind))
        assert line == f"--dpo-reference-cache c is not used: --dpo-reference {kind} keeps no log-probabilities"
