"""The samples that a run trains on, in their order, and how many iterations its epochs are."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hft_megatron.config import derived
from hft_megatron.config.schema import DataConfig, RunConfig
from hft_megatron.config.training_rules import warmup_fits
from hft_megatron.data.order import Order, SampleStream
from hft_megatron.data.packing import PackedOrder, PackingRule


def sample_stream(
    order: Order, positions: NDArray[np.signedinteger[Any]], room: int, options: DataConfig
) -> SampleStream:
    """The examples of ``order``, or packs of them under --packing; a function of its arguments alone.

    ``positions`` are those of each example, of shape (examples,); a pack has at most ``room`` of them.
    """
    if not options.packing:
        return order
    rule = PackingRule(capacity=room, algorithm=options.packing_algorithm, window=options.packing_window)
    return PackedOrder(order, positions, rule)


def with_iterations(config: RunConfig, samples: SampleStream, world_size: int) -> RunConfig:
    """--train-epochs as --train-iters: enough that the last sample of the last epoch is trained.

    Raises UserError for a warm-up that takes all of them.
    """
    epochs = config.training.train_epochs
    if epochs is None:
        return config
    iterations = -(-samples_of_epochs(samples, epochs) // derived.global_batch_size(config, world_size))
    warmup_fits(config.optimizer, iterations)
    return replace(config, training=replace(config.training, train_iters=iterations, train_epochs=None))


def samples_of_epochs(samples: SampleStream, epochs: int) -> int:
    """How many samples the first ``epochs`` hold together; packed epochs differ in their number."""
    starts = samples.epoch_starts(1)
    while len(starts) <= epochs:
        starts = samples.epoch_starts(starts[-1] + 1)
    return starts[epochs]


def describe_samples(samples: SampleStream, epochs: int | None, iterations: int) -> Iterator[str]:
    """Lines for the log: how full packs are, and what --train-epochs comes to."""
    if isinstance(samples, PackedOrder):
        rule = samples.rule
        yield (
            f"packed by {rule.algorithm} in windows of {rule.window}: {len(samples.packs(0))} packs of {rule.capacity} "
            f"positions in the first epoch, {1 - samples.fill(0):.2%} padding"
        )
    if epochs is not None:
        kind = "packs" if isinstance(samples, PackedOrder) else "examples"
        yield f"--train-epochs {epochs}: {samples_of_epochs(samples, epochs)} {kind} in {iterations} iterations"
