"""Divergences of two models are those of their full logits, in every layout. Run: pytest tests/evaluation"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.conversion.load import load_weights
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import UserError
from hft_megatron.evaluation.forgetting import TextDifference, check_one_vocabulary, compare, statistics
from hft_megatron.evaluation.forward import ModelInPlace
from hft_megatron.evaluation.measures import MEASURES
from hft_megatron.model.build import build_model
from tests.support.models import LAYOUTS, build_from_folder, make_llama
from tests.support.ranks import RankPools
from tests.support.tiers import quick
from tests.support.tokenizers import make_byte_level

# The last has one scored token, the first of its text is never scored.
TEXTS = [
    ([1, 5, 9, 20, 33, 7, 81], [False, True, True, True, True, True, True]),
    ([1, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39], [False] * 4 + [True] * 3 + [False] * 2 + [True] * 2),
    ([1, 7, 2], [False, False, True]),
]


def make_pair(folder: Path, variant: str = "gqa") -> tuple[Path, Path]:
    """A base, and a model that is near it."""
    base, tuned = make_llama(folder / "base", variant), make_llama(folder / "tuned", variant)
    weights = load_file(tuned / "model.safetensors")
    for number, name in enumerate(sorted(weights)):
        noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(number))
        weights[name] += 0.02 * noise
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    return base, tuned


def run_compare(base: str, tuned: str, layout: dict[str, Any], dtype: str = "float32") -> list[dict[str, Any]] | None:
    first, _, placement = build_from_folder(base, layout, getattr(torch, dtype))
    shape = ModelShape.from_hf_config(load_hf_config(tuned), tuned)
    second = build_model(
        shape, ParallelConfig(**layout), TrainingConfig(), placement=placement, dtype=getattr(torch, dtype)
    )
    load_weights(tuned, second, shape, placement)
    models = [
        ModelInPlace(chunks=[chunk.eval() for chunk in chunks], placement=placement) for chunks in (first, second)
    ]
    batch = [(np.array(ids, dtype=np.int32), np.array(scored)) for ids, scored in TEXTS]
    found = compare(models[0], models[1], batch)
    return None if found is None else [asdict(one) for one in found]


def by_transformers(base: Path, tuned: Path) -> list[dict[str, float]]:
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (base, tuned)]
    found = []
    for ids, scored in TEXTS:
        rows = torch.tensor(scored)[1:].nonzero().flatten()
        with torch.no_grad():
            first, second = (model(torch.tensor([ids])).logits[0].double().log_softmax(-1)[rows] for model in models)
        targets = torch.tensor(ids)[1:][rows, None]
        found.append(
            {
                "tokens": len(rows),
                "base_nats": -float(first.gather(1, targets).sum()),
                "tuned_nats": -float(second.gather(1, targets).sum()),
                "kl_base_tuned": float((first.exp() * (first - second)).sum()),
                "kl_tuned_base": float((second.exp() * (second - first)).sum()),
            }
        )
    return found


CASES = {"tp1": "gqa", "tp2_sp": "odd_vocab", "pp2": "tied", "pp2_vpp": "llama3_rope", "tp2_pp2": "llama32"}
SIZES = {"tp1": 1, "tp2_pp2": 4}


@pytest.mark.parametrize("layout", quick(CASES, ["tp2_sp"]))
def test_every_layout_gives_what_full_logits_do(layout: str, ranks: RankPools, tmp_path: Path) -> None:
    base, tuned = make_pair(tmp_path, CASES[layout])
    call = {"base": str(base), "tuned": str(tuned)}
    answers = ranks(SIZES.get(layout, 2)).run(run_compare, layout=LAYOUTS[layout], **call)
    [alone] = ranks(1).run(run_compare, layout={}, **call)
    said = [answer for answer in answers if answer is not None]
    assert len(said) == LAYOUTS[layout].get("tensor_model_parallel_size", 1)
    expected = by_transformers(base, tuned)
    assert expected[0]["kl_base_tuned"] > 0.05, "the models differ"
    for answer in said:
        for one, of_one_rank, by_others in zip(answer, alone, expected, strict=True):
            tokens = by_others["tokens"]
            assert one == pytest.approx(of_one_rank, abs=1e-6 * tokens, rel=1e-6)
            assert one == pytest.approx(by_others, abs=1e-4)


def test_a_model_has_forgotten_nothing_of_itself(ranks: RankPools, tmp_path: Path) -> None:
    folder = str(make_llama(tmp_path))
    for dtype in ("float32", "bfloat16"):
        [found] = ranks(1).run(run_compare, base=folder, tuned=folder, layout={}, dtype=dtype)
        assert [(one["kl_base_tuned"], one["kl_tuned_base"]) for one in found] == [(0.0, 0.0)] * len(TEXTS)
        assert [one["base_nats"] for one in found] == [one["tuned_nats"] for one in found]


def test_an_example_is_the_sum_of_its_sequences_and_a_value_is_per_token() -> None:
    parts = [
        TextDifference(tokens=3, base_nats=6.0, tuned_nats=7.5, kl_base_tuned=0.3, kl_tuned_base=0.6),
        TextDifference(tokens=1, base_nats=1.0, tuned_nats=2.5, kl_base_tuned=0.1, kl_tuned_base=0.2),
    ]
    found = {name: MEASURES[name].total(sums) for name, sums in statistics(parts).items()}
    assert found == pytest.approx(
        {
            "cross_entropy": 2.5,
            "base_cross_entropy": 1.75,
            "forgetting": 0.75,
            "kl_base_tuned": 0.1,
            "kl_tuned_base": 0.2,
        }
    )


def test_models_of_two_vocabularies_are_refused_with_both_names(tmp_path: Path) -> None:
    ours = load_tokenizer(None, make_byte_level(tmp_path / "a"))
    others = load_tokenizer(None, make_byte_level(tmp_path / "b", merges=False))
    check_one_vocabulary(("--base a", "--model b"), (96, 96), (ours, ours))
    with pytest.raises(UserError, match="--base a has a vocabulary of 96 rows and --model b one of 97"):
        check_one_vocabulary(("--base a", "--model b"), (96, 97), (ours, ours))
    with pytest.raises(UserError, match="--base a and --model b have tokenizers that split texts differently"):
        check_one_vocabulary(("--base a", "--model b"), (96, 96), (ours, others))
