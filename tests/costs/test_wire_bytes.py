"""The size of a gradient buffer, on examples small enough to add up by hand."""

import pytest

from hft_megatron.costs.rank_costs import TrainedShard, default_bucket_size, lay_out


def elements_of(found: list[TrainedShard], *, data_parallel_size: int, bucket_size: int | None) -> int:
    """Elements of the whole buffer."""
    buckets = lay_out(found, data_parallel_size=data_parallel_size, bucket_size=bucket_size)
    return buckets[-1].end if buckets else 0


def shards(*elements: int) -> list[TrainedShard]:
    return [TrainedShard(elements=count) for count in elements]


@pytest.mark.parametrize(
    ("elements", "data_parallel_size", "bucket_size", "expected"),
    [
        ([], 2, None, 0),
        ([1], 2, None, 128),
        ([128], 2, None, 128),
        ([100, 30], 2, None, 256),  # 30, then 100 from 64 on: 164
        ([30, 100], 2, None, 256),  # 100, then 30 from 128 on: 158
        ([128], 3, None, 384),  # lcm(3, 128)
        ([100, 100, 100], 2, 100, 384),  # a bucket each
        ([100, 100, 100], 2, 150, 384),  # 100 and 100 from 128 on: 228 is full and ends at 256; 100 more end at 384
        ([100, 100, 100], 2, 10_000, 384),  # 356 in one bucket
        ([64, 64, 64, 64], 2, 128, 256),  # two full buckets
        ([64, 64, 64], 2, 64, 384),  # three buckets, each padded from 64 to 128
        ([64, 64, 64], 2, None, 256),
    ],
)
def test_parameters_start_at_multiples_of_64_and_buckets_end_at_multiples_of_lcm_of_ranks_and_128(
    elements, data_parallel_size, bucket_size, expected
):
    size = elements_of(shards(*elements), data_parallel_size=data_parallel_size, bucket_size=bucket_size)
    assert size == expected


def test_parameters_are_laid_out_in_reverse_order():
    # From the end: 60 (full) ends at 128; 10, then 60 from 192 on (full) ends at 256.
    assert elements_of(shards(60, 10, 60), data_parallel_size=1, bucket_size=50) == 256
    # From the end: 10, then 60 from 64 on (full) ends at 128; 60 (full) ends at 256.
    assert elements_of(shards(60, 60, 10), data_parallel_size=1, bucket_size=50) == 256
    # From the end: 60 and 60 are full on their own and end at 256; 10 more end at 384.
    assert elements_of(shards(10, 60, 60), data_parallel_size=1, bucket_size=50) == 384


def test_a_tied_embedding_on_pipelines_has_a_bucket_of_its_own():
    tied = TrainedShard(elements=64, own_bucket=True)
    assert elements_of([tied, *shards(64)], data_parallel_size=2, bucket_size=None) == 256
    assert elements_of([*shards(64), tied], data_parallel_size=2, bucket_size=None) == 256
    assert elements_of([*shards(64), tied, *shards(64)], data_parallel_size=2, bucket_size=None) == 384


def test_data_parallel_ranks_own_equal_parts_of_every_bucket_and_padding_counts_for_nobody():
    # From the end: 100 from 0, 30 from 128 on, padded from 158 to 256: each rank owns 128 elements, padding included.
    [bucket] = lay_out(shards(30, 100), data_parallel_size=2, bucket_size=None)
    assert (bucket.start, bucket.end, bucket.parameters) == (0, 256, ((0, 100), (128, 158)))
    assert bucket.owned_elements(2) == [100, 30]
    assert bucket.owned_elements(4) == [64, 36, 30, 0]
    # A second bucket is cut anew: its positions count from the start of the buffer.
    first, second = lay_out(shards(200, 100), data_parallel_size=2, bucket_size=100)
    assert (first.start, first.end, second.start, second.end) == (0, 128, 128, 384)
    assert (first.owned_elements(2), second.owned_elements(2)) == ([64, 36], [128, 72])


@pytest.mark.parametrize(
    ("trainable", "ranks", "expected"),
    [
        (55_000_000, 2, 3_437_500),  # a small model still has something to overlap
        (55_000_000, 8, 8_000_000),  # but no rank has less than a million
        (3_500_000_000, 8, 40_000_000),  # from here on megatron-core's
        (3_500_000_000, 64, 64_000_000),
        (1_000_000, 1, 1_000_000),
    ],
)
def test_buckets_are_a_16th_of_what_trains_within_bounds_of_a_rank_and_of_megatron_core(trainable, ranks, expected):
    assert default_bucket_size(trainable, ranks) == expected
