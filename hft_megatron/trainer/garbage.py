"""When Python's garbage is collected under --manual-gc: on all ranks at once, not on each at a time of its own."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from hft_megatron.config.training import TrainingConfig


@contextmanager
def collected_by_hand(options: TrainingConfig) -> Iterator[None]:
    """Within it, nothing is collected under --manual-gc but here and by the two functions below."""
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
    """Collects where the iteration is one of --manual-gc-interval."""
    if options.manual_gc and options.manual_gc_interval and iteration % options.manual_gc_interval == 0:
        gc.collect()


@contextmanager
def collected_around_validation(options: TrainingConfig) -> Iterator[None]:
    """Collects before it and, of what is young, after it, as Megatron does; not under --no-manual-gc-eval."""
    if not (options.manual_gc and options.manual_gc_eval):
        yield
        return
    gc.collect()
    yield
    gc.collect(generation=0)
