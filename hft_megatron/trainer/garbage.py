"""Collection of Python's garbage under --manual-gc: on all ranks at the same time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from hft_megatron.config.training import TrainingConfig


@contextmanager
def collected_by_hand(options: TrainingConfig) -> Iterator[None]:
    """Within it, under --manual-gc garbage is collected only here and by the two functions below."""
    was_enabled = gc.isenabled()
    if options.manual_gc:
        gc.disable()
        gc.collect()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def collect_after_step(options: TrainingConfig, iteration: int) -> None:
    """Collects at multiples of --manual-gc-interval."""
    if options.manual_gc and options.manual_gc_interval and iteration % options.manual_gc_interval == 0:
        gc.collect()


@contextmanager
def collected_around_validation(options: TrainingConfig) -> Iterator[None]:
    """Collects before it, and the youngest generation after it, as Megatron does; not under --no-manual-gc-eval."""
    if not (options.manual_gc and options.manual_gc_eval):
        yield
        return
    gc.collect()
    yield
    gc.collect(generation=0)
