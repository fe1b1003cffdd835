"""TensorBoard's event files read back."""

from pathlib import Path

import pytest


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value) of every event; skips the test without the package."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
