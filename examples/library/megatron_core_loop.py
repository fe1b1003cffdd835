"""A plan in a training loop of one's own on megatron-core: its schedules, data-parallel wrapper and optimizer.

Run: torchrun --nproc-per-node 2 examples/library/megatron_core_loop.py MODEL TENSOR_PARALLEL_SIZE
"""

import sys
from collections.abc import Iterator
from typing import Any

from hft_megatron import draw_plan
from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.config.optimizer import OptimizerConfig
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.engine.start import prepare_engine
from hft_megatron.parallel import launch

prepare_engine()  # before torch and megatron-core are imported

import torch  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from hft_megatron.conversion.load import load_weights  # noqa: E402
from hft_megatron.model.build import build_model  # noqa: E402
from hft_megatron.optimizer.wrapping import wrap  # noqa: E402
from hft_megatron.parallel.groups import start_backend, start_groups, stop_groups  # noqa: E402

STEPS, MICRO_BATCHES, LENGTH = 4, 2, 16


def forward_step(batches: Iterator[Any], chunk: torch.nn.Module) -> tuple[Any, Any]:
    """One micro-batch, as megatron-core's schedules want it: the output, and what makes a loss of it."""
    tokens = next(batches)
    positions = torch.arange(LENGTH, device=tokens.device).expand(1, LENGTH)
    losses = chunk(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    return losses, lambda output: (output.sum(), torch.tensor(LENGTH), {"loss": output.detach().mean()})


def main(folder: str, tensor_parallel_size: int) -> None:
    """Trains half of the matrices on random tokens."""
    launch.place_this_process()
    shape = ModelShape.from_hf_config(load_hf_config(folder), folder)
    parallel = ParallelConfig(tensor_model_parallel_size=tensor_parallel_size)
    start_backend(parallel)
    placement = start_groups(parallel, shape.num_layers, seed=1)
    # q, k and v are matrices of their own in this model, as are gate and up: megatron-core's GPTModel joins them.
    chunks = build_model(shape, parallel, TrainingConfig(), placement=placement, dtype=torch.float32)
    load_weights(folder, chunks, shape, placement)
    plan = draw_plan(shape, ratio=0.5, seed=1)
    wrapped = wrap(chunks, plan, parallel, OptimizerConfig(lr=1e-3), bf16=False)
    torch.manual_seed(1)
    batch = torch.randint(shape.vocab_size, (MICRO_BATCHES, 1, LENGTH + 1), device=placement.device)
    for step in range(STEPS):
        wrapped.zero_gradients()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batch),
            model=list(wrapped.chunks),
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        wrapped.optimizer.step()
        if placement.is_last_rank:
            print(f"step {step}: loss {sum(float(report['loss']) for report in reports) / len(reports):.4f}")
    stop_groups()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], int(sys.argv[2]))
