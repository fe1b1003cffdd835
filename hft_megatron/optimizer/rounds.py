"""Switches a model from one round's plan to the next one's inside the process."""

import torch.distributed as dist

from hft_megatron.config.schema import HFTConfig, OptimizerConfig, ParallelConfig
from hft_megatron.hft.plan import Plan
from hft_megatron.model.parameters import parameter_slots
from hft_megatron.optimizer.carried import CarriedState, give_state, take_state
from hft_megatron.optimizer.wrapping import WrappedModel, unwrap, wrap


def switch_round(
    wrapped: WrappedModel,
    plan: Plan,
    parallel: ParallelConfig,
    options: OptimizerConfig,
    hft: HFTConfig,
    *,
    bf16: bool,
    group: dist.ProcessGroup,
) -> WrappedModel:
    """Unwraps the model and wraps it for ``plan``; ``wrapped`` is of no use after that.

    ``group`` are the data-parallel ranks; every rank must call it. Moments start at zero (``--hft-moments reset``), or
    those of units that go on training, and on request of units that rest, are carried over. With reset, bf16 masters
    start anew from the bf16 weights, as in a run started from a checkpoint's weights.
    """
    carries = hft.hft_moments == "carry"
    slots = list(parameter_slots(wrapped.modules))
    carried = CarriedState()
    if carries:
        keeps_resting = hft.hft_resting_moments == "host"
        units = wrapped.plan.training if keeps_resting else wrapped.plan.training & plan.training
        fresh = take_state(wrapped.shards, slots, units, group, going_on=plan.training)
        resting = wrapped.resting
        carried = CarriedState(steps=resting.steps | fresh.steps, tensors=resting.tensors | fresh.tensors)
    chunks = unwrap(wrapped)
    new = wrap(chunks, plan, parallel, options, bf16=bf16, steps_per_unit=carries, traffic=wrapped.traffic)
    give_state(new.shards, slots, carried, group)
    new.resting.steps, new.resting.tensors = carried.steps, carried.tensors
    return new
