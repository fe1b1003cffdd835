"""Packs hold every example of an epoch once, never too much, and the same ones wherever they are made.

Run: pytest tests/data/test_packing.py
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hft_megatron.config.data import DataConfig
from hft_megatron.data.order import (
    MixtureOrder,
    Order,
    PackedOrder,
    PackingRule,
    SampleOrder,
    first_fit,
    shares_of_epoch,
)
from hft_megatron.data.tokenizer_loading import load_tokenizer
from tests.support.data_files import load, write_rows

ALGORITHMS: tuple[Any, ...] = ("first_fit_decreasing", "first_fit_shuffle")
DEFAULT_WINDOW = DataConfig().packing_window


def packed(
    lengths: NDArray[np.int64], capacity: int, algorithm: Any, window: int, order: Order | None = None
) -> PackedOrder:
    order = SampleOrder(num_examples=len(lengths), seed=7) if order is None else order
    return PackedOrder(order, lengths, PackingRule(capacity=capacity, algorithm=algorithm, window=window))


def random_lengths(seed: int, capacity: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, int(rng.integers(2, capacity + 1)), rng.integers(1, 200), endpoint=True)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("seed", range(25))
def test_an_epoch_packs_each_example_once_and_no_pack_overflows(algorithm: str, seed: int) -> None:
    capacity, window = 2 + 13 * seed, 1 + 7 * seed
    lengths = random_lengths(seed, capacity)
    samples = packed(lengths, capacity, algorithm, window)
    starts = samples.epoch_starts(10 * len(lengths))
    for epoch in range(3):
        packs = [samples.sample(position) for position in range(starts[epoch], starts[epoch + 1])]
        assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
        assert all(0 < sum(lengths[index] for index in pack) <= capacity for pack in packs)
        assert samples.fill(epoch) == pytest.approx(lengths.sum() / (len(packs) * capacity))


@pytest.mark.parametrize("seed", range(10))
def test_first_fit_takes_the_first_pack_with_room(seed: int) -> None:
    lengths = random_lengths(seed, 50)
    room: list[int] = []
    for length, number in zip(lengths.tolist(), first_fit(lengths[None], 50)[0].tolist(), strict=True):
        fitting = [pack for pack, left in enumerate(room) if left >= length]
        assert number == (fitting[0] if fitting else len(room))
        if not fitting:
            room.append(50)
        room[number] -= length


def test_a_mixture_is_packed_as_often_as_its_epoch_draws_each_example() -> None:
    sizes, lengths = (5, 40), np.arange(1, 46) % 9 + 1
    shares = shares_of_epoch(sizes, [2, 1])
    order = MixtureOrder(num_examples=45, seed=3, sizes=sizes, shares=shares)
    samples = packed(lengths, 20, "first_fit_decreasing", 16, order)
    starts = samples.epoch_starts(200)
    for epoch in range(3):
        drawn = Counter(order.sample_index(position) for position in range(45 * epoch, 45 * (epoch + 1)))
        assert max(drawn.values()) > 1
        found = [samples.sample(position) for position in range(starts[epoch], starts[epoch + 1])]
        assert Counter(index for pack in found for index in pack) == drawn


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_any_position_can_be_asked_for_first_and_epochs_and_seeds_differ(algorithm: str) -> None:
    lengths = random_lengths(3, 60)
    samples = packed(lengths, 64, algorithm, 8)
    stop = samples.epoch_starts(1)[1] * 5
    forward = [tuple(samples.sample(position)) for position in range(stop)]
    again = packed(lengths, 64, algorithm, 8)
    assert [tuple(again.sample(position)) for position in reversed(range(stop))] == forward[::-1]
    starts = samples.epoch_starts(stop)
    assert len({frozenset(forward[starts[epoch] : starts[epoch + 1]]) for epoch in range(3)}) == 3
    other = packed(lengths, 64, algorithm, 8, SampleOrder(num_examples=len(lengths), seed=8))
    assert [tuple(other.sample(position)) for position in range(stop)] != forward


def test_the_longest_examples_do_not_come_first() -> None:
    lengths = np.arange(1, 1001)
    samples = packed(lengths, 1000, "first_fit_decreasing", 500)
    longest = [max(lengths[index] for index in samples.sample(position)) for position in range(100)]
    assert longest != sorted(longest, reverse=True)
    assert 400 < np.mean(longest[:50]) < 900


def test_the_packs_of_a_seed_never_change() -> None:
    # Resuming an old run needs this: another list here is other data in every packed run.
    samples = packed(np.array([5, 3, 8, 2, 7, 4]), 10, "first_fit_decreasing", 4)
    assert [samples.sample(position) for position in range(8)] == [[4], [1], [2, 3], [0, 5], [0], [2, 3], [4, 1], [5]]


@pytest.mark.parametrize(("name", "long_examples"), [("gsm8k", "error"), ("ultrafeedback", "split")])
def test_real_data_fill_at_least_98_percent_of_2048_positions(
    shared_data: Path, tmp_path: Path, name: str, long_examples: str
) -> None:
    rows: list[dict[str, Any]] = []
    if name == "gsm8k":
        for line in (shared_data / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.append({"prompt": row["question"] + "\n", "completion": row["answer"]})
    else:
        lines = (shared_data / "preference/ultrafeedback_train.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [{"messages": json.loads(line)["chosen"]} for line in lines]
    tokenizer = load_tokenizer("SentencePieceTokenizer", shared_data / "tokenizers/llama2")
    dataset = load(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, 2048, long_examples)
    assert dataset.parts[0].counts.lost_tokens == 0
    assert dataset.parts[0].counts.read == len(rows)
    for algorithm in ALGORITHMS:
        samples = packed(dataset.lengths - 1, 2048, algorithm, DEFAULT_WINDOW, dataset.order(1234))
        fills = [samples.fill(epoch) for epoch in range(3)]
        assert min(fills) >= 0.98, f"{algorithm}: {fills}"
