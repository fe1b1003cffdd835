"""How many samples an iteration takes, against megatron-core's calculator.

Run: pytest tests/config/test_batch_sizes.py
"""

import pytest
from megatron.core import num_microbatches_calculator

from hft_megatron.config.batch_sizes import BatchSizes

RAMPS = [
    (4, (2, 2, 6)),
    (8, (2, 2, 30)),
    (8, (2, 3, 7)),
    (12, (4, 4, 1)),
    (16, (1, 1, 100)),
    (64, (16, 8, 1000)),
    (4, ()),
]


def sizes_of_megatron(full: int, ramp: tuple[int, ...], samples: int) -> list[int]:
    """Megatron-LM's loop over the iterations of a run, with megatron-core's calculator."""
    if not ramp:
        return [full] * (samples // full)
    calculator = num_microbatches_calculator.RampupBatchsizeNumMicroBatchesCalculator(full, 1, 1, False, 1, *ramp)
    found, consumed = list[int](), 0
    while consumed <= ramp[2]:
        calculator.update(consumed, consistency_check=True)
        found.append(calculator.get_current_global_batch_size())
        consumed += found[-1]
    return [*found, *[full] * (max(0, samples - consumed) // full)]


@pytest.mark.skipif(
    not hasattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator"),
    reason="megatron-core 0.19 has no ramp-up any more; the formula is that of 0.16",
)
@pytest.mark.parametrize(("full", "ramp"), RAMPS)
def test_batches_and_the_length_of_the_run_are_megatrons(full: int, ramp: tuple[int, ...]) -> None:
    sizes = BatchSizes(full=full, ramp=ramp)
    for samples in range(ramp[2] + 1 if ramp else 1, 3000, 37):
        expected = sizes_of_megatron(full, ramp, samples)
        assert sizes.iterations_of(samples) == len(expected)
        assert [sizes.of(iteration) for iteration in range(len(expected))] == expected
    starts = [sum(expected[:iteration]) for iteration in range(len(expected) + 1)]
    assert [sizes.samples_before(iteration) for iteration in range(len(starts))] == starts
    assert [sizes.after(start) for start in starts] == [*expected, full]
    for samples in range(starts[-1]):
        assert sizes.first_from(samples) == next(number for number, start in enumerate(starts) if start >= samples)


def test_a_ramp_by_hand() -> None:
    # 6 samples for the one size below the full one: the batch that begins at sample 6 is full, by the division.
    sizes = BatchSizes(full=4, ramp=(2, 2, 6))
    assert [sizes.of(iteration) for iteration in range(5)] == [2, 2, 2, 4, 4]
    assert [sizes.iterations_of(samples) for samples in (7, 9, 10, 13, 14, 17)] == [4, 4, 4, 4, 5, 5]


def test_a_ramp_of_a_hundred_million_iterations_is_known_at_once() -> None:
    sizes = BatchSizes(full=2048, ramp=(32, 32, 10**11))
    assert sizes.samples_before(sizes.iterations_of(10**12)) <= 10**12 < sizes.samples_before(10**9)
