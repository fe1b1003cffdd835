from pathlib import Path

import pytest

from hft_megatron.tracking.trackers import TensorBoardTracker
from tests.support.event_files import scalars

pytest.importorskip("tensorboard")


def test_event_files_read_back_under_megatrons_keys(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(str(tmp_path), kept_until=0)
    metrics = {"lm loss": 2.5, "learning rate": 0.5, "grad norm": 1.25, "elapsed time per iteration (ms)": 250.0}
    metrics |= {"throughput per GPU (TFLOP/s/GPU)": 2.0, "max allocated memory (GB)": 0.5}
    tracker.log(7, {**metrics, "plan digest": "5d29", "round": 1, "global batch size": 32})
    tracker.log(7, {"lm loss validation": 2.0})
    tracker.close()
    assert scalars(tmp_path) == {
        "lm loss": [(7, 2.5)],
        "learning-rate": [(7, 0.5)],
        "grad-norm": [(7, 1.25)],
        "iteration-time": [(7, 0.25)],
        "throughput": [(7, 2.0)],
        "mem-max-allocated-bytes": [(7, 5e8)],
        "batch-size": [(7, 32.0)],
        "round": [(7, 1.0)],
        "lm loss validation": [(7, 2.0)],
    }


def test_a_resumed_run_replaces_the_iterations_it_does_again(tmp_path: Path) -> None:
    for start, losses in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (1, {2: 20.0})):
        tracker = TensorBoardTracker(str(tmp_path), kept_until=start)
        for step, loss in losses.items():
            tracker.log(step, {"lm loss": loss})
        tracker.close()
    assert scalars(tmp_path) == {"lm loss": [(1, 1.0), (2, 20.0)]}
