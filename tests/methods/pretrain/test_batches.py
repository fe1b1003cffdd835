"""Steps of a corpus at any layout. Run: pytest tests/methods/pretrain/test_batches.py"""

import pytest
import torch

from hft_megatron.data.batches import BatchShare, StepBatch
from hft_megatron.methods.pretrain.data import CorpusBatches, CorpusValidation, validation_samples
from hft_megatron.methods.pretrain.datasets import Samples

GLOBAL_BATCH, LENGTH = 12, 5
LAYOUTS = [(1, 1), (12, 1), (3, 2), (2, 3), (1, 4), (1, 12)]


class Numbered:
    """Sample i holds 1000 * i + position."""

    def __len__(self) -> int:
        return 500

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        assert 0 <= index < len(self)
        tokens = 1000 * index + torch.arange(LENGTH)
        return {"tokens": tokens, "labels": tokens + 1, "loss_mask": torch.ones(LENGTH), "position_ids": tokens}


def batches(
    size: int,
    rank: int,
    ranks: int,
    samples: Samples | None = None,
    end: int | None = None,
    ramp: tuple[int, ...] = (),
) -> CorpusBatches:
    share = BatchShare(
        micro_batch_size=size,
        global_batch_size=GLOBAL_BATCH,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        length_multiple=1,
        ramp=ramp,
    )
    return CorpusBatches(samples=samples or Numbered(), seq_length=LENGTH, share=share, end=end)


def samples_in(parts: list[StepBatch]) -> list[int]:
    """Numbers of the samples of all ranks' micro-batches, in the order of the global batch."""
    micro_batches = [micro for step in zip(*(part.micro_batches for part in parts), strict=True) for micro in step]
    return [int(row[0]) // 1000 for micro in micro_batches for row in micro["tokens"]]


@pytest.mark.parametrize(("size", "ranks"), LAYOUTS)
def test_a_step_holds_the_same_samples_in_the_same_order_in_every_layout(size: int, ranks: int) -> None:
    for consumed in (0, 12, 48):
        parts = [batches(size, rank, ranks).step(consumed) for rank in range(ranks)]
        assert samples_in(parts) == list(range(consumed, consumed + GLOBAL_BATCH))
        for part in parts:
            assert (part.sequences, part.seq_length) == (size, LENGTH)
            assert (part.tokens, part.squared_lengths) == (GLOBAL_BATCH * LENGTH, GLOBAL_BATCH * LENGTH**2)
            assert {tuple(micro[name].shape) for micro in part.micro_batches for name in micro} == {(size, LENGTH)}
            assert {name for micro in part.micro_batches for name in micro} == {"tokens", "labels", "loss_mask"}


@pytest.mark.parametrize(("size", "ranks"), [layout for layout in LAYOUTS if 4 % (layout[0] * layout[1]) == 0])
def test_a_step_of_a_ramp_holds_as_many_samples_as_it_should(size: int, ranks: int) -> None:
    for consumed, count in ((0, 4), (4, 4), (8, 8), (16, 12), (28, 12)):
        parts = [batches(size, rank, ranks, ramp=(4, 4, 16)).step(consumed) for rank in range(ranks)]
        assert samples_in(parts) == list(range(consumed, consumed + count))
        assert {(part.tokens, part.squared_lengths) for part in parts} == {(count * LENGTH, count * LENGTH**2)}


ENDS = ([9, 1, 1, 9, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 9], [9, 9, 1, 1, 1])
"""Samples in turn, in which 9 ends a document."""
DOCUMENTS = ([1, 3, 1], [5], [5], [1, 1, 3])
"""How long the documents of each are."""


class WithEnds(Numbered):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**super().__getitem__(index), "tokens": torch.tensor(ENDS[index % 4])}


@pytest.mark.parametrize(("size", "ranks"), LAYOUTS)
def test_documents_that_are_apart_are_segments_of_one_sequence_in_every_layout(size: int, ranks: int) -> None:
    consumed = 2
    parts = [batches(size, rank, ranks, WithEnds(), end=9).step(consumed) for rank in range(ranks)]
    found = [micro for step in zip(*(part.micro_batches for part in parts), strict=True) for micro in step]
    for number, micro in enumerate(found):
        own = [(consumed + number * size + row) % 4 for row in range(size)]
        assert micro["cu_seqlens"].dtype == torch.int32
        assert micro["cu_seqlens"].diff().tolist() == [length for row in own for length in DOCUMENTS[row]]
        assert micro["tokens"].tolist() == [[token for row in own for token in ENDS[row]]]
        assert {tuple(micro[name].shape) for name in ("tokens", "labels", "loss_mask")} == {(1, size * LENGTH)}
    for part in parts:
        assert (part.sequences, part.seq_length, part.tokens) == (1, size * LENGTH, GLOBAL_BATCH * LENGTH)
        assert part.squared_lengths == 3 * sum(length**2 for lengths in DOCUMENTS for length in lengths)


@pytest.mark.parametrize(("interval", "iterations"), [(4, [4, 8, 10]), (5, [5, 10]), (None, [10]), (20, [10])])
def test_every_validation_continues_where_the_last_one_stopped(interval: int | None, iterations: list[int]) -> None:
    steps = 2
    available = validation_samples(
        train_iters=10, eval_interval=interval, eval_iters=steps, global_batch_size=GLOBAL_BATCH
    )
    for size, ranks in LAYOUTS:
        seen = []
        for iteration in iterations:
            by_rank = [
                list(
                    CorpusValidation(
                        batches=batches(size, rank, ranks), eval_iters=steps, eval_interval=interval
                    ).steps(iteration)
                )
                for rank in range(ranks)
            ]
            assert {len(steps_of_rank) for steps_of_rank in by_rank} == {steps}
            seen += [number for parts in zip(*by_rank, strict=True) for number in samples_in(list(parts))]
        assert seen == list(range(len(iterations) * steps * GLOBAL_BATCH))
        assert len(seen) <= available
