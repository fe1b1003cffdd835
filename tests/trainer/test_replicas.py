"""Ranks that hold other bits of a weight than their replicas are named."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hft_megatron.errors import RunFailed
from hft_megatron.model.parameters import parameter_slots
from hft_megatron.trainer.weight_checks import odd_ones
from tests.support.runs import Recorder, make_inputs, run_recorded, words_for

HEAD = "model.embed_tokens"
NORM = "model.layers.2.input_layernorm"
PLACE = r"\S+ \(TP {}, PP {}, DP {}\)"


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("replicas"), tie_word_embeddings=True)


def run_with_a_flipped_bit(words: list[str], unit: str) -> dict[str, Any]:
    """What the run said in which, after iteration 2, one bit of one rank's weight is flipped."""
    recorder = Recorder(kill_at=None, kill_rank=0)

    def flip(run: Any, result: Any) -> None:
        Recorder.after_step(recorder, run, result)
        if run.state.iteration == 2 and run.placement.rank == 1:
            slot = [slot for slot in parameter_slots(run.wrapped.modules) if slot.unit == unit][-1]
            slot.parameter.data.view(-1).view(torch.uint8)[9] ^= 4

    recorder.after_step = flip  # type: ignore[method-assign]
    try:
        run_recorded("sft", words, recorder)
    except RunFailed as failure:
        return {"failed": str(failure), "steps": len(recorder.steps)}
    return {"failed": "", "steps": len(recorder.steps)}


@pytest.mark.parametrize(
    ("layout", "options", "unit", "coordinates"),
    [
        ("--overlap-grad-reduce --overlap-param-gather", f"--hft-freeze {NORM}", NORM, (0, 0, "{}")),
        ("--bf16", "--hft-ratio 1", "model.layers.3.mlp.up_proj", (0, 0, "{}")),
        ("--tensor-model-parallel-size 2 --sequence-parallel", "--bf16", NORM, ("{}", 0, 0)),
        ("--pipeline-model-parallel-size 2", "", HEAD, (0, "{}", 0)),
    ],
    ids=["a frozen unit at dp2", "a trained unit at dp2", "a norm at tp2", "a tied embedding at pp2"],
)
def test_a_flipped_bit_of_one_replica_ends_the_run_and_names_unit_and_ranks(
    ranks, inputs, layout, options, unit, coordinates
):
    words = words_for(inputs, "--check-replicas-interval", 1, *layout.split(), *options.split())
    first, second = ranks(2).run(run_with_a_flipped_bit, words=words, unit=unit)
    assert first == second
    assert first["steps"] == 2
    one, other = (PLACE.format(*(str(place).format(rank) for place in coordinates)) for rank in (0, 1))
    assert re.match(
        rf"iteration 2: rank 0 on {one} and rank 1 on {other} hold different bits of {re.escape(unit)}; ",
        first["failed"],
    ), first["failed"]


def test_replicas_that_agree_and_an_interval_that_is_not_reached_say_nothing(ranks, inputs):
    words = words_for(inputs, "--check-replicas-interval", 7, "--hft-freeze", NORM)
    assert [answer["failed"] for answer in ranks(2).run(run_with_a_flipped_bit, words=words, unit=NORM)] == ["", ""]


def test_where_most_ranks_agree_the_others_are_named() -> None:
    where = [f"rank {rank} on a" for rank in range(5)]
    assert odd_ones({0: 7, 1: 9, 2: 7, 4: 7}, where) == "rank 1 on a holds other bits than ranks 0, 2, 4"
    assert odd_ones({0: 1, 1: 9, 2: 9, 3: 9, 4: 8}, where) == (
        "rank 0 on a and rank 4 on a hold other bits than ranks 1 to 3"
    )
    assert odd_ones({0: 1, 1: 1, 2: 2, 3: 2}, where).endswith("rank 3 on a hold different bits")
