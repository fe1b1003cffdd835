"""Gradient buffers are not cleared: what the first gradient of a step is written over doesn't matter."""

from typing import Any
from unittest.mock import patch

import pytest

from hft_megatron.optimizer.wrapping import WrappedModel
from tests.support.models import make_llama
from tests.support.toy_training import TINY, make_run, take_steps

LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "data, overlapped": {"overlap_grad_reduce": True, "ddp_bucket_size": 2000},
    "tensor": {"tensor_model_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    # Whose schedule starts a chunk's reductions itself.
    "interleaved, overlapped": {
        "pipeline_model_parallel_size": 2,
        "num_layers_per_virtual_pipeline_stage": 1,
        "overlap_grad_reduce": True,
    },
}


def run_over_garbage(folder: str, layout: dict[str, Any], bf16: bool, garbage: float | None) -> dict[str, Any]:
    """Losses and norms of steps that begin with ``garbage`` in all gradient buffers, and what is in them after a
    reduction that no backward pass came before."""
    run = make_run(folder, layout, training={"bf16": bf16})
    buffers = [buffer for chunk in run.wrapped.chunks for buffer in chunk.buffers]
    parameters = [parameter for buffer in buffers for parameter in buffer.params]
    make_ready = WrappedModel.zero_gradients

    def leave_garbage(wrapped: WrappedModel) -> None:
        make_ready(wrapped)
        for buffer in buffers if garbage is not None else []:
            buffer.grad_data.fill_(garbage)

    with patch.object(WrappedModel, "zero_gradients", leave_garbage):
        steps = take_steps(run, 3)
        run.wrapped.zero_gradients()
        for chunk in run.wrapped.chunks:
            if layout.get("overlap_grad_reduce"):
                chunk.start_grad_sync()
            chunk.finish_grad_sync()
    return {"steps": steps, "left": [parameter.main_grad.abs().max().item() for parameter in parameters]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("variant", "bf16"), [("gqa", False), ("tied", False), ("tied", True)])
def test_no_gradient_is_added_to_what_the_last_step_left(ranks, tmp_path, layout, variant, bf16):
    options = {"folder": str(make_llama(tmp_path / "model", variant, **TINY)), "layout": LAYOUTS[layout], "bf16": bf16}
    clean, dirty = (ranks(2).run(run_over_garbage, **options, garbage=garbage) for garbage in (None, float("nan")))
    for one, other in zip(clean, dirty, strict=True):
        assert one["steps"] == other["steps"]
        assert set(other["left"]) == {0.0}
