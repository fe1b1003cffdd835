"""A checkpoint's size by formula, against real ones. Run: pytest tests/checkpoint/test_size.py"""

import math
from pathlib import Path
from typing import Any

import pytest
from megatron.core import dist_checkpointing

from hft_megatron.checkpoint.verification import checkpoint_bytes
from hft_megatron.cli.entry import commands
from hft_megatron.config.loading import load_options
from hft_megatron.config.validation import shape_of
from hft_megatron.hft.plan import make_plan
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for


def run_and_measure(words: list[str], checkpoint: str) -> int:
    """Trains, and returns the bytes of all tensors in a checkpoint of it, those of random states left out."""
    run_sft_words(words)
    tensors = dist_checkpointing.load_tensors_metadata(checkpoint)
    counted = {key: tensor for key, tensor in tensors.items() if "random" not in key}
    return sum(math.prod(tensor.global_shape) * tensor.dtype.itemsize for tensor in counted.values())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"), vocab_size=336)


CASES: dict[str, list[str]] = {
    "fp32": ["--no-bf16"],
    "bf16 with masters": ["--bf16"],
    "trained only": ["--bf16", "--save-trained-only"],
}


@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_the_bytes_of_a_real_checkpoint(
    ranks: RankPools, inputs: Path, tmp_path: Path, case: str
) -> None:
    run = tmp_path / "run"
    words = words_for(inputs, "--train-iters", 1, "--lr-warmup-iters", 0, "--save", run, *CASES[case])
    measured: Any = ranks(2).run(run_and_measure, words=words, checkpoint=str(run / "iter_0000001"))[0]
    config = load_options(commands()["sft"].options, words).as_run
    shape = shape_of(config.model)
    assert shape is not None
    plan = make_plan(shape, config.hft, default_seed=config.training.seed)
    assert measured == checkpoint_bytes(plan, config, bf16="--bf16" in CASES[case])
