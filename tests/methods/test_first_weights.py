"""The first weights that --kl-to-base compares with: where they have adapters, and where a run is resumed or over.

Run: pytest tests/methods/test_first_weights.py
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from hft_megatron.config.dpo import DpoConfig
from hft_megatron.methods.objectives.asked import asked_of_run
from tests.support.models import LAYOUTS, flags, make_llama
from tests.support.plain_run import parse
from tests.support.ranks import RankPools
from tests.support.runs import VOCAB_SIZE, Recorder, make_inputs, run_recorded, run_sft_words, words_for
from tests.support.toy_training import TINY

KL = ["--kl-to-base", "0.5"]
SHORT = ["--train-iters", "2", "--lr-warmup-iters", "0"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("first"), **TINY)


@pytest.fixture(scope="module")
def adapter(ranks: RankPools, inputs: Path) -> Path:
    """One that does something."""
    folder = inputs / "adapter"
    words = words_for(inputs, "--lora-rank", 4, "--train-iters", 0, "--save-lora", folder)
    ranks(1).run(run_sft_words, words=words)
    file, generator = folder / "adapter_model.safetensors", torch.Generator().manual_seed(3)
    drawn = {name: 0.1 * torch.randn(one.shape, generator=generator) for name, one in load_file(file).items()}
    save_file(drawn, file, metadata={"format": "pt"})
    return folder


def divergences(values: list[dict[str, Any]]) -> list[float]:
    return [step["measured"]["kl to base"] for step in values[-1]["steps"]]


@pytest.mark.parametrize("kind", ["shared", "model"])
def test_a_trained_adapter_is_compared_with_itself_and_a_new_one_with_nothing(
    ranks: RankPools, inputs: Path, adapter: Path, kind: str
) -> None:
    for start in (["--lora-adapter", adapter], ["--lora-rank", 4]):
        words = words_for(inputs, *KL, *start, "--kl-reference", kind, *SHORT)
        values = ranks(1).run(run_sft_words, words=words)
        found = divergences(values)
        assert found[0] == 0.0 < found[1]
        copied = "and a copy of each unit that trains" if "--lora-adapter" in start else "without its adapters"
        assert any(copied in line for line in values[0]["said"]) == (kind == "shared")


CASES = {"dp2 overlap": ["--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "3000"]}
CASES["tp2_sp, dropout"] = [*flags(LAYOUTS["tp2_sp"]), "--lora-dropout", "0.2"]


@pytest.mark.slow(reason="seven runs each")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("start", ["folder", "run"])
def test_a_run_from_adapters_that_is_stopped_resumes_with_the_same_first_ones(
    ranks: RankPools, inputs: Path, adapter: Path, tmp_path: Path, case: str, start: str
) -> None:
    first = ["--lora-adapter", adapter]
    if start == "run":
        words = words_for(inputs, "--lora-adapter", adapter, *SHORT, "--save", tmp_path / "first")
        ranks(2).run(run_sft_words, words=words)
        first = ["--lora-rank", 4, "--load", tmp_path / "first", "--finetune"]

    def run(save: str, *options: object) -> list[dict[str, Any]]:
        folders = ["--save", tmp_path / save]
        if start == "folder":
            folders += ["--load", tmp_path / save]
        words = words_for(inputs, *KL, *CASES[case], *first, *folders, "--train-iters", 4, *options)
        return ranks(2).run(run_sft_words, words=words)

    whole, other = run("whole"), run("second model", "--kl-reference", "model")
    begun = run("parted", "--exit-interval", 2)
    assert begun[0]["stopped"]
    resumed = run("parted")
    assert (divergences(whole)[0] == 0.0) == ("dropout" not in case)  # which the comparison has not
    assert divergences(whole)[-1] > 0.0
    assert [step["loss"] for step in other[-1]["steps"]] == [step["loss"] for step in whole[-1]["steps"]]
    for one, two, all_of_it in zip(begun, resumed, whole, strict=True):
        assert one["steps"] + two["steps"] == all_of_it["steps"]
        assert two["state"] == all_of_it["state"]


def run_beside_preferences(words: list[str], model: str) -> dict[str, Any]:
    """As a stage whose other stages compare with a reference model of their own."""
    options = DpoConfig(dpo_reference="model", dpo_reference_model=model)
    return run_recorded("sft", words, Recorder(kill_at=None, kill_rank=0), dpo=options)


@pytest.mark.slow(reason="five runs")
def test_the_reference_model_of_preferences_is_no_reference_of_examples(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    model = str(make_llama(tmp_path / "other", vocab_size=VOCAB_SIZE, initializer_range=0.05, **TINY))
    ranks(1).run(run_sft_words, words=words_for(inputs, "--save", tmp_path / "first", *SHORT))
    words = words_for(inputs, *KL, "--load", tmp_path / "first", "--finetune", "--train-iters", 4)
    alone = ranks(1).run(run_sft_words, words=[*words, "--save", str(tmp_path / "alone")])
    stopped = ["--exit-interval", "2"]
    for kind in ("shared", "model"):
        saved = [*words, "--save", str(tmp_path / kind), "--kl-reference", kind]
        parts = [ranks(1).run(run_beside_preferences, words=[*saved, *stop], model=model) for stop in (stopped, [])]
        assert parts[0][0]["steps"] + parts[1][0]["steps"] == alone[0]["steps"], kind


def test_a_run_that_is_over_asks_no_weights_which_may_be_gone() -> None:
    config = parse("sft", ["--load-hf", "model", "--train-iters", "4", *KL])
    inputs = cast(Any, SimpleNamespace(config=config, is_over=True))
    nothing = cast(Any, None)
    assert asked_of_run(inputs, [], nothing, nothing, nothing, print) is None
