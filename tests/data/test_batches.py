"""The same samples are trained in every layout, masks select exactly the trained tokens, and lengths agree."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from hft_megatron.data.batches import BatchesInOrder, BatchShare, ExampleBatches, ShuffledBatches, StepBatch
from hft_megatron.data.dataset import ExamplesInMemory, SftDataset
from hft_megatron.data.order import PackedOrder, PackingRule, SampleOrder

PAD = 0
GLOBAL_BATCH = 8
LAYOUTS = [(size, ranks) for size, ranks in product((1, 2, 4, 8), (1, 2, 4, 8)) if size * ranks <= GLOBAL_BATCH]


def make_dataset(lengths: list[int], seq_length: int) -> SftDataset:
    """Example i has ids 1000 i + 1, 1000 i + 2, ... of which the second half is trained."""
    tokens = [1000 * number + np.arange(1, length + 1, dtype=np.int32) for number, length in enumerate(lengths)]
    trained = [np.arange(length) >= length // 2 for length in lengths]
    return SftDataset(
        parts=(),
        stores=(
            ExamplesInMemory(
                tokens=np.concatenate(tokens).astype(np.int32),
                trained=np.concatenate(trained),
                offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
                places=np.array([f"0:{number}" for number in range(len(lengths))], dtype=np.bytes_),
            ),
        ),
        seq_length=seq_length,
        digest="",
    )


def random_dataset(num_examples: int) -> SftDataset:
    lengths = np.random.default_rng(0).integers(2, 202, num_examples).tolist()
    return make_dataset(lengths, seq_length=201)


def share_of(size: int, rank: int, ranks: int, multiple: int = 1) -> BatchShare:
    return BatchShare(
        micro_batch_size=size,
        global_batch_size=GLOBAL_BATCH,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        length_multiple=multiple,
    )


def training(dataset: SftDataset, size: int, rank: int, ranks: int, multiple: int = 1) -> ShuffledBatches:
    return ShuffledBatches(
        batches=ExampleBatches(dataset=dataset, pad_id=PAD, share=share_of(size, rank, ranks, multiple)),
        order=SampleOrder(num_examples=len(dataset), seed=7),
    )


def validation(dataset: SftDataset, size: int, rank: int, ranks: int) -> BatchesInOrder:
    return BatchesInOrder(batches=ExampleBatches(dataset=dataset, pad_id=PAD, share=share_of(size, rank, ranks)))


def global_batch(parts: list[StepBatch], name: str) -> torch.Tensor:
    """The rows of all ranks' micro-batches, in the order of the global batch."""
    return torch.cat(
        [micro[name] for step in zip(*(part.micro_batches for part in parts), strict=True) for micro in step]
    )


def sampled(dataset: SftDataset, consumed: int) -> list[int]:
    """Numbers of the examples of a step, without packing."""
    order = training(dataset, GLOBAL_BATCH, 0, 1).order
    return [order.sample(position)[0] for position in range(consumed, consumed + GLOBAL_BATCH)]


@pytest.mark.parametrize(("size", "ranks"), LAYOUTS)
def test_the_global_batch_is_the_same_in_every_layout(size: int, ranks: int) -> None:
    dataset = random_dataset(21)
    for consumed in (0, 8, 16, 800):
        whole = training(dataset, GLOBAL_BATCH, 0, 1).step(consumed)
        parts = [training(dataset, size, rank, ranks).step(consumed) for rank in range(ranks)]
        assert {part.seq_length for part in parts} == {whole.seq_length}
        for name in ("tokens", "labels", "loss_mask"):
            assert torch.equal(global_batch(parts, name), whole.micro_batches[0][name])
        lengths = [dataset.num_positions(index) for index in sampled(dataset, consumed)]
        assert {part.tokens for part in parts} == {sum(lengths)}
        assert {part.squared_lengths for part in parts} == {sum(length**2 for length in lengths)}


def test_a_mean_over_the_global_mask_is_the_same_in_every_layout_and_a_mean_of_means_is_not() -> None:
    dataset = random_dataset(21)
    means, means_of_means = set(), set()
    for size, ranks in LAYOUTS:
        parts = [training(dataset, size, rank, ranks).step(0) for rank in range(ranks)]
        micros = [micro for part in parts for micro in part.micro_batches]
        losses = [(micro["labels"] % 7 * micro["loss_mask"]).sum() for micro in micros]
        masks = [micro["loss_mask"].sum() for micro in micros]
        means.add(float(torch.stack(losses).sum() / torch.stack(masks).sum()))
        means_of_means.add(round(float(torch.stack([a / b for a, b in zip(losses, masks, strict=True)]).mean()), 6))
    assert len(means) == 1
    assert len(means_of_means) > 1


def test_labels_are_the_next_tokens_and_the_mask_marks_trained_ones() -> None:
    dataset = make_dataset([5] * GLOBAL_BATCH, seq_length=4)
    micro = training(dataset, 1, 0, 1).step(0).micro_batches[0]
    first = 1000 * SampleOrder(num_examples=GLOBAL_BATCH, seed=7).sample_index(0)
    assert micro["tokens"].tolist() == [[first + 1, first + 2, first + 3, first + 4]]
    assert micro["labels"].tolist() == [[first + 2, first + 3, first + 4, first + 5]]
    assert micro["loss_mask"].tolist() == [[0, 1, 1, 1]]
    assert (micro["tokens"].dtype, micro["labels"].dtype) == (torch.int64, torch.int64)
    assert micro["loss_mask"].dtype == torch.float32


def test_padding_is_the_pad_token_and_is_never_trained() -> None:
    dataset = make_dataset([5, 90] * 4, seq_length=200)
    micro = training(dataset, GLOBAL_BATCH, 0, 1).step(0).micro_batches[0]
    padding = micro["labels"] == PAD
    assert micro["tokens"].shape == (GLOBAL_BATCH, 128)
    assert int(padding.sum()) == 4 * (128 - 4) + 4 * (128 - 89)
    assert torch.equal(padding, micro["tokens"] == PAD)
    assert not micro["loss_mask"][padding].any()


@pytest.mark.parametrize(
    ("longest", "seq_length", "multiple", "expected"),
    [
        (1, 512, 1, 64),
        (64, 512, 1, 64),
        (65, 512, 1, 128),
        (65, 512, 6, 192),
        (100, 100, 1, 100),
        (100, 100, 8, 104),
        (60, 100, 8, 64),
    ],
)
def test_the_length_is_rounded_up_but_not_beyond_the_sequence_length(
    longest: int, seq_length: int, multiple: int, expected: int
) -> None:
    dataset = make_dataset([2] * 7 + [longest + 1], seq_length)
    assert training(dataset, 1, 0, 1, multiple).step(0).seq_length == expected


@pytest.mark.parametrize(("size", "ranks"), LAYOUTS)
def test_an_epoch_holds_each_example_once_in_every_layout(size: int, ranks: int) -> None:
    dataset = random_dataset(24)
    seen = [
        int(row[0]) // 1000
        for rank in range(ranks)
        for consumed in range(0, 24, GLOBAL_BATCH)
        for micro in training(dataset, size, rank, ranks).step(consumed).micro_batches
        for row in micro["tokens"]
    ]
    assert sorted(seen) == list(range(24))


def packed_training(dataset: SftDataset, size: int, rank: int, ranks: int, multiple: int = 1) -> ShuffledBatches:
    lengths = dataset.lengths - 1
    rule = PackingRule(capacity=dataset.seq_length, algorithm="first_fit_shuffle", window=50)
    order = PackedOrder(SampleOrder(num_examples=len(dataset), seed=7), lengths, rule)
    return replace(training(dataset, size, rank, ranks, multiple), order=order, packed=True)


@pytest.mark.parametrize(("size", "ranks"), LAYOUTS)
def test_packs_are_the_same_in_every_layout_and_lie_end_to_end_in_one_sequence(size: int, ranks: int) -> None:
    dataset = random_dataset(200)
    order = packed_training(dataset, 1, 0, 1).order
    for consumed in (0, 8, 96):
        rows = packed_training(dataset, 1, 0, 1).step(consumed)
        parts = [packed_training(dataset, size, rank, ranks).step(consumed) for rank in range(ranks)]
        assert {(part.sequences, part.seq_length) for part in parts} == {(1, size * rows.seq_length)}
        for name in ("tokens", "labels", "loss_mask"):
            whole = torch.cat([micro[name] for micro in rows.micro_batches]).view(GLOBAL_BATCH, -1)
            assert torch.equal(global_batch(parts, name).view(GLOBAL_BATCH, -1), whole)
        examples = [index for position in range(GLOBAL_BATCH) for index in order.sample(consumed + position)]
        lengths = [dataset.num_positions(index) for index in examples]
        assert {part.tokens for part in parts} == {sum(lengths)}
        assert {part.squared_lengths for part in parts} == {sum(length**2 for length in lengths)}
        for part in parts:
            for micro in part.micro_batches:
                assert micro["tokens"].shape == (1, part.seq_length)


def test_segments_are_whole_examples_or_padding() -> None:
    dataset = random_dataset(60)
    batches = packed_training(dataset, 4, 0, 1)
    seen: list[int] = []
    for consumed in range(0, batches.order.epoch_starts(1)[1] - GLOBAL_BATCH, GLOBAL_BATCH):
        for micro in batches.step(consumed).micro_batches:
            cu_seqlens = micro["cu_seqlens"]
            assert cu_seqlens.dtype == torch.int32
            assert (int(cu_seqlens[0]), int(cu_seqlens[-1])) == (0, micro["tokens"].size(1))
            for start, stop in pairwise(cu_seqlens.tolist()):
                tokens, mask = micro["tokens"][0, start:stop], micro["loss_mask"][0, start:stop]
                if tokens[0] == PAD:
                    assert not tokens.any()
                    assert not mask.any()
                    continue
                index = int(tokens[0]) // 1000
                ids, trained = dataset.example(index)
                assert tokens.tolist() == ids[:-1].tolist()
                assert micro["labels"][0, start:stop].tolist() == ids[1:].tolist()
                assert mask.tolist() == trained[1:].tolist()
                seen.append(index)
    assert len(seen) == len(set(seen)) > 40


@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_the_trained_tokens_of_a_packed_epoch_do_not_depend_on_the_layout(size: int, ranks: int) -> None:
    dataset = random_dataset(150)
    epoch = packed_training(dataset, size, 0, ranks).order.epoch_starts(1)[1]
    steps = range(0, epoch - epoch % GLOBAL_BATCH, GLOBAL_BATCH)
    trained: Counter[int] = Counter()
    for rank in range(ranks):
        for consumed in steps:
            for micro in packed_training(dataset, size, rank, ranks).step(consumed).micro_batches:
                trained.update(micro["labels"][micro["loss_mask"] > 0].tolist())
    order = packed_training(dataset, 1, 0, 1).order
    expected: Counter[int] = Counter()
    for position in range(steps.stop):
        for index in order.sample(position):
            ids, mask = dataset.example(index)
            expected.update(ids[1:][mask[1:]].tolist())
    assert trained == expected
    assert set(trained.values()) == {1}


@pytest.mark.parametrize(("size", "ranks"), LAYOUTS)
@pytest.mark.parametrize("num_examples", [1, 8, 21])
def test_validation_sees_each_example_once_with_equal_work_on_every_rank(
    size: int, ranks: int, num_examples: int
) -> None:
    dataset = random_dataset(num_examples)
    by_rank = [list(validation(dataset, size, rank, ranks).steps(0)) for rank in range(ranks)]
    assert {len(steps) for steps in by_rank} == {-(-num_examples // GLOBAL_BATCH)}
    assert {len(step.micro_batches) for steps in by_rank for step in steps} == {GLOBAL_BATCH // (size * ranks)}
    rows = [row for parts in zip(*by_rank, strict=True) for row in global_batch(list(parts), "tokens")]
    masks = [row for parts in zip(*by_rank, strict=True) for row in global_batch(list(parts), "loss_mask")]
    assert [int(row[0]) // 1000 for row in rows[:num_examples]] == list(range(num_examples))
    assert all(bool((row == PAD).all()) for row in rows[num_examples:])
    assert not any(bool(mask.any()) for mask in masks[num_examples:])
    trained = sum(int(dataset.example(index)[1][1:].sum()) for index in range(num_examples))
    assert sum(float(mask.sum()) for mask in masks) == trained


def test_validation_can_stop_early() -> None:
    batches = validation(random_dataset(21), 1, 0, 1)
    assert len(batches) == 3
    stopped = [replace(batches, limit=limit).steps(iteration=5) for limit in (0, 1, 9, None)]
    assert [len(list(steps)) for steps in stopped] == [0, 1, 3, 3]
