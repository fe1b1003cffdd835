"""The next batch is assembled while a step runs. Run: pytest tests/data/test_prefetch.py"""

import threading

import pytest
import torch

from hft_megatron.data.batches import BatchShare, PrefetchedSteps, StepBatch

BATCH = 4


class Steps:
    """Says which steps were assembled, and on whose thread."""

    share = BatchShare(
        micro_batch_size=1, global_batch_size=BATCH, data_parallel_rank=0, data_parallel_size=1, length_multiple=1
    )

    def __init__(self) -> None:
        self.assembled: list[int] = []
        self.threads: set[int] = set()
        self.is_next = threading.Event()

    def step(self, consumed_samples: int) -> StepBatch:
        if consumed_samples == 3 * BATCH:
            raise OSError("the disk is gone")
        self.threads.add(threading.get_ident())
        self.assembled.append(consumed_samples)
        if consumed_samples == BATCH:
            self.is_next.set()
        return StepBatch(
            sequences=1,
            seq_length=1,
            tokens=1,
            squared_lengths=1,
            micro_batches=[{"tokens": torch.tensor([[consumed_samples]])}],
        )


def first_token(batch: StepBatch) -> int:
    return int(batch.micro_batches[0]["tokens"])


def test_a_step_is_assembled_before_it_is_asked_for_on_another_thread() -> None:
    steps = Steps()
    prefetched = PrefetchedSteps(steps, stop=3 * BATCH)
    assert first_token(prefetched.step(0)) == 0
    assert steps.is_next.wait(10)
    assert [first_token(prefetched.step(one * BATCH)) for one in (1, 2)] == [BATCH, 2 * BATCH]
    assert len(steps.threads) == 1
    assert threading.get_ident() not in steps.threads


def test_no_step_is_assembled_that_the_run_does_not_take() -> None:
    steps = Steps()
    prefetched = PrefetchedSteps(steps, stop=2 * BATCH)
    prefetched.step(0)
    prefetched.step(BATCH)
    prefetched._thread.shutdown(wait=True)
    assert steps.assembled == [0, BATCH]


def test_another_step_than_the_next_is_what_was_asked_for() -> None:
    prefetched = PrefetchedSteps(Steps(), stop=100 * BATCH)
    assert [first_token(prefetched.step(one * BATCH)) for one in (0, 7, 5, 5)] == [0, 7 * BATCH, 5 * BATCH, 5 * BATCH]


def test_what_the_assembly_raises_reaches_the_step_that_needs_it() -> None:
    prefetched = PrefetchedSteps(Steps(), stop=10 * BATCH)
    assert first_token(prefetched.step(2 * BATCH)) == 2 * BATCH
    with pytest.raises(OSError, match="the disk is gone"):
        prefetched.step(3 * BATCH)


def test_with_cuda_the_tensors_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor + 1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    assert first_token(PrefetchedSteps(Steps(), stop=BATCH).step(0)) == 1
    assert len(pinned) == 1
