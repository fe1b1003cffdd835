"""Wraps a model for one round: DDP buffers and the optimizer, over what the plan trains and nothing else.

The only module that knows how megatron-core builds its optimizer.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import megatron.core.optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from hft_megatron.config.schema import OptimizerConfig, ParallelConfig
from hft_megatron.hft.application import apply_plan
from hft_megatron.hft.plan import Plan
from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.parameters import ParameterSlot, parameter_slots
from hft_megatron.optimizer.distributed import HFTDistributedOptimizer
from hft_megatron.optimizer.traffic import Traffic


@dataclass(frozen=True, kw_only=True)
class WrappedModel:
    """A model wrapped for one plan."""

    plan: Plan
    chunks: tuple[DistributedDataParallel, ...]
    optimizer: MegatronOptimizer
    """What the loop steps; megatron-core's chain around ``shards``."""
    shards: HFTDistributedOptimizer
    traffic: Traffic
    """What the run has sent and where its time goes; the next round's wrapper goes on with it."""

    @property
    def modules(self) -> tuple[LlamaModel, ...]:
        return tuple(chunk.module for chunk in self.chunks)

    @contextlib.contextmanager
    def gathered_parameters(self) -> Iterator[None]:
        """Within it every rank holds the newest parameters: overlapped gathers are finished and their hooks rest."""
        overlapped = self.chunks[0].ddp_config.overlap_param_gather
        if overlapped:
            for chunk in self.chunks:
                chunk.disable_forward_pre_hook(param_sync=True)
        try:
            yield
        finally:
            if overlapped:
                for chunk in self.chunks:
                    chunk.enable_forward_pre_hook()

    def zero_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()


def wrap(
    chunks: Sequence[LlamaModel],
    plan: Plan,
    parallel: ParallelConfig,
    options: OptimizerConfig,
    *,
    bf16: bool,
    traffic: Traffic | None = None,
) -> WrappedModel:
    """Applies the plan, then builds gradient buffers and optimizer state for its training units only.

    ``traffic`` is the last round's, whose counts go on; None for the first round of a run.
    """
    traffic = traffic or Traffic()
    slots = list(parameter_slots(chunks))
    apply_plan(slots, plan)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.ddp_bucket_size,
        check_for_nan_in_grad=True,
    )
    config = chunks[0].config
    with traffic.lending_bucket_groups():
        wrapped = tuple(
            # Later virtual chunks reduce off the critical path: one bucket each, as Megatron does.
            DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        )
    with _building_hft_optimizers(plan, slots):
        optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=options.lr,
                min_lr=options.min_lr,
                weight_decay=options.weight_decay,
                adam_beta1=options.adam_beta1,
                adam_beta2=options.adam_beta2,
                adam_eps=options.adam_eps,
                clip_grad=options.clip_grad,
                bf16=bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=True,
                overlap_param_gather=parallel.overlap_param_gather,
            ),
            list(wrapped),
            use_gloo_process_groups=False,
        )
    shards = _only_hft_optimizer(optimizer)
    _connect_schedules(config, wrapped, optimizer)
    config.timers = traffic.clock.megatron_timers
    return WrappedModel(plan=plan, chunks=wrapped, optimizer=optimizer, shards=shards, traffic=traffic)


@contextlib.contextmanager
def _building_hft_optimizers(plan: Plan, slots: Sequence[ParameterSlot]) -> Iterator[None]:
    """``get_megatron_optimizer`` names its class outright and has no hook for another: lend it ours meanwhile."""
    unit_of = {slot.parameter: slot.unit for slot in slots}

    def build(*args: Any, **kwargs: Any) -> HFTDistributedOptimizer:
        return HFTDistributedOptimizer(*args, plan=plan, unit_of=unit_of, **kwargs)

    original = megatron_optimizer.DistributedOptimizer
    megatron_optimizer.DistributedOptimizer = build
    try:
        yield
    finally:
        megatron_optimizer.DistributedOptimizer = original


def _only_hft_optimizer(optimizer: MegatronOptimizer) -> HFTDistributedOptimizer:
    assert isinstance(optimizer, ChainedOptimizer)
    inner = optimizer.chained_optimizers
    assert all(isinstance(one, HFTDistributedOptimizer) for one in inner), [type(one) for one in inner]
    assert len(inner) == 1, "dense models have one distributed optimizer"
    only: HFTDistributedOptimizer = inner[0]
    return only


def adam_in_use() -> str:
    """Which Adam megatron-core found at import: transformer-engine's, Apex's or torch's."""
    module = megatron_optimizer.Adam.__module__
    return "transformer-engine" if module.startswith("transformer_engine") else module.split(".")[0]


def _connect_schedules(config: Any, wrapped: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Tells the pipeline schedules when to hold back, start and finish gradient and parameter traffic."""

    def one_or_all(functions: list[Any]) -> Any:
        return functions[0] if len(functions) == 1 else functions

    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    ddp_config = wrapped[0].ddp_config
    # param_sync_func stays unset: each chunk's own hooks start the next gather, bucket by bucket.
    config.no_sync_func = config.grad_sync_func = config.param_sync_func = None
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = one_or_all([chunk.no_sync for chunk in wrapped])
        config.grad_sync_func = one_or_all([chunk.start_grad_sync for chunk in wrapped])
