"""Generated ids are transformers' at every layout, with and without a cache. Run: pytest tests/evaluation"""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hft_megatron.evaluation.forward import ModelInPlace
from hft_megatron.evaluation.generation import GenerationRules, draw, generate
from hft_megatron.evaluation.scoring import score
from tests.support.models import LAYOUTS, build_from_folder, make_llama
from tests.support.ranks import RankPools

PROMPTS = [[1, 5, 9, 20], [1, 7], [1, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39], [1, 90, 4, 4, 17, 2, 60]]
NEW_TOKENS = 12


def prompts() -> list[Any]:
    return [np.array(ids, dtype=np.int32) for ids in PROMPTS]


class Numbers:
    """Stands for a tokenizer whose text is the ids: the models here have none."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f" {number}" for number in ids)


def run_generate(folder: str, layout: dict[str, Any], end_ids: list[int], rules: dict[str, Any]) -> dict[str, Any]:
    chunks, _, placement = build_from_folder(folder, layout)
    for chunk in chunks:
        chunk.eval()
    model = ModelInPlace(chunks=chunks, placement=placement)
    found: dict[str, Any] = {}
    for use_cache in (True, False):
        texts = generate(
            model,
            Numbers(),  # type: ignore[arg-type]
            prompts(),
            GenerationRules(max_new_tokens=NEW_TOKENS, end_ids=tuple(end_ids), **rules),
            numbers=range(len(PROMPTS)),
            use_cache=use_cache,
        )
        found["with cache" if use_cache else "without"] = [list(text.ids) for text in texts]
        found["ended by"] = [text.ended_by for text in texts]
        found["texts"] = [text.text for text in texts]
    scored = [(ids, np.arange(len(ids)) > 0) for ids in prompts()]
    scores = score(model, scored)
    found["scores"] = None if scores is None else [(one.log_prob, one.tokens, one.is_greedy) for one in scores]
    return found


def by_transformers(folder: Path, end_ids: list[int]) -> tuple[list[list[int]], list[float]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    continued, log_probs = [], []
    for ids in PROMPTS:
        prompt = torch.tensor([ids])
        with torch.no_grad():
            whole = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=end_ids or None,
                pad_token_id=0,
            )
            logits = model(prompt).logits.log_softmax(-1)
        continued.append([token for token in whole[0, len(ids) :].tolist() if token not in end_ids])
        log_probs.append(float(logits[0, :-1].gather(1, prompt[0, 1:, None]).sum()))
    return continued, log_probs


CASES = [
    ("gqa", "tp1"),
    ("odd_vocab", "tp2_sp"),
    ("llama3_rope", "pp2_vpp"),
]
OTHERS = [
    pytest.param(variant, layout, marks=pytest.mark.slow)
    for variant in ("mha", "gqa", "tied", "odd_vocab", "llama3_rope", "llama32")
    for layout in ("tp1", "tp2", "pp2", "tp2_pp2", "dp2")
    if (variant, layout) not in CASES and (variant != "llama32" or layout == "tp2_pp2")
]
SIZES = {"tp1": 1, "tp2_pp2": 4}


@pytest.mark.parametrize(
    ("variant", "layout"), [*(pytest.param(*case, marks=pytest.mark.engine) for case in CASES), *OTHERS]
)
def test_ids_and_log_likelihoods_are_transformers(variant: str, layout: str, ranks: RankPools, tmp_path: Path) -> None:
    folder = make_llama(tmp_path, variant)
    plain, _ = by_transformers(folder, [])
    end_ids = [plain[0][4], plain[2][7]]
    expected, log_probs = by_transformers(folder, end_ids)
    assert len({len(ids) for ids in expected}) >= 2, "some texts end and others continue"
    answers = ranks(SIZES.get(layout, 2)).run(
        run_generate, folder=str(folder), layout=LAYOUTS[layout], end_ids=end_ids, rules={}
    )
    for answer in answers:
        assert answer["with cache"] == expected
        assert answer["without"] == expected
        if answer["scores"] is not None:
            assert [score[0] for score in answer["scores"]] == pytest.approx(log_probs, abs=1e-4)
    assert any(answer["scores"] is not None for answer in answers)


def test_a_text_does_not_depend_on_the_layout_it_is_drawn_in(ranks: RankPools, tmp_path: Path) -> None:
    folder = str(make_llama(tmp_path))
    rules = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3}
    call = {"folder": folder, "end_ids": [5, 6, 7], "rules": rules}
    [alone] = ranks(1).run(run_generate, layout={}, **call)
    for layout in ("tp2_sp", "pp2"):
        for answer in ranks(2).run(run_generate, layout=LAYOUTS[layout], **call):
            assert answer["with cache"] == alone["with cache"] == answer["without"]
    [other] = ranks(1).run(run_generate, layout={}, **call | {"rules": rules | {"seed": 4}})
    assert other["with cache"] != alone["with cache"]


def test_a_stop_string_ends_a_text_and_is_no_part_of_it(ranks: RankPools, tmp_path: Path) -> None:
    folder = make_llama(tmp_path)
    plain, _ = by_transformers(folder, [])
    over_two_tokens = f" {plain[2][4]} {plain[2][5]}"
    [answer] = ranks(1).run(
        run_generate, folder=str(folder), layout={}, end_ids=[], rules={"stop": ("never", over_two_tokens)}
    )
    assert answer["ended by"][2] == "stop string"
    assert answer["texts"][2] == "".join(f" {token}" for token in plain[2][:4])
    assert answer["ended by"].count("length") >= 1


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.6), (12, 0.8)])
def test_tokens_are_drawn_from_the_distribution_that_transformers_makes(top_k: int, top_p: float) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    warpers += [] if top_k == 0 else [TopKLogitsWarper(top_k)]
    warpers += [TopPLogitsWarper(top_p)]
    expected = warpers(None, logits.clone()).softmax(-1)[0]
    rules = GenerationRules(temperature=0.7, top_k=top_k, top_p=top_p)
    stream, samples = torch.Generator().manual_seed(2), 20_000
    drawn = draw(logits.expand(samples, -1), rules, [stream] * samples)
    shares = torch.bincount(drawn, minlength=40) / samples
    assert set(drawn.unique().tolist()) <= set(expected.nonzero().flatten().tolist())
    # Four standard deviations of the likeliest token's share.
    assert (shares - expected).abs().max() < 4 * (0.25 / samples) ** 0.5


class Sorts(TorchDispatchMode):
    """Notes how many numbers of a row are sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.sort:
            self.sizes.append(args[0].size(1))
        return func(*args, **(kwargs or {}))


def drawn_with(top_k: int, logits: Tensor, sorts: Sorts | None = None) -> list[int]:
    rules = GenerationRules(temperature=0.5, top_k=top_k)
    with sorts or contextlib.nullcontext():
        return draw(logits, rules, [torch.Generator().manual_seed(row) for row in range(len(logits))]).tolist()


def of_few_values() -> Tensor:
    """Logits (64, 500), of which many are equal, as in bf16."""
    return torch.randint(0, 12, (64, 500), generator=torch.Generator().manual_seed(1)).float()


def test_of_equally_likely_tokens_the_first_are_among_the_top_ones() -> None:
    logits = of_few_values()
    for top_k in (1, 3, 60, 499):
        expected = logits.clone()
        expected.scatter_(1, logits.sort(dim=1, descending=True, stable=True).indices[:, top_k:], float("-inf"))
        assert drawn_with(top_k, logits) == drawn_with(0, expected)


def test_top_tokens_are_found_without_the_whole_vocabulary_in_order() -> None:
    logits, sorts = torch.randn(4, 500, generator=torch.Generator().manual_seed(1)), Sorts()
    drawn_with(7, logits, sorts)
    assert sorts.sizes == [7, 7]


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [0, 20])
def test_a_gpu_draws_what_a_processor_draws(top_k: int) -> None:
    assert drawn_with(top_k, of_few_values().cuda()) == drawn_with(top_k, of_few_values())
