"""Wraps a model for one round (gradient buffers and optimizer, over what the plan trains alone) and unwraps it.

The only module that knows how megatron-core builds its optimizer.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import is_
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, clip_grads, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.utils import local_multi_tensor_scale
from torch import Tensor
from torch.nn import Parameter

from hft_megatron.config.optimizer import OptimizerConfig
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.training import TransformerImpl
from hft_megatron.costs.rank_costs import default_bucket_size
from hft_megatron.hft.on_ranks import apply_plan
from hft_megatron.hft.plan import Plan
from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.parameters import ParameterSlot, parameter_slots
from hft_megatron.optimizer.carried import CarriedState
from hft_megatron.optimizer.distributed import HFTDistributedOptimizer
from hft_megatron.optimizer.momentum_filter import MomentumFilteredAdamW, filter_updates
from hft_megatron.optimizer.traffic import Traffic
from hft_megatron.optimizer.whole_gradients import finalize_gradients

MARKS = ("main_grad", "main_param", "main_param_sharded", "grad_added_to_main_grad", "unwritten_gradients")
"""Attributes of a parameter while it is trained."""


@dataclass(frozen=True, kw_only=True)
class WrappedModel:
    """A model wrapped for one plan."""

    plan: Plan
    chunks: tuple[DistributedDataParallel, ...]
    optimizer: MegatronOptimizer
    """The optimizer that the loop steps; megatron-core's chain around ``shards``."""
    shards: HFTDistributedOptimizer
    traffic: Traffic
    """Bytes that the run has sent and its times; the next round's wrapper continues with it."""
    frozen: CarriedState = field(default_factory=CarriedState)
    """State of units that are frozen in this round; empty unless --hft-frozen-moments host."""

    @property
    def unit_steps(self) -> dict[str, int]:
        """Updates in the moments of every unit that has any; the same on every rank."""
        training = {unit: self.shards.steps_of(unit) for unit in self.plan.training}
        return {unit: steps for unit, steps in (training | self.frozen.steps).items() if steps > 0}

    @property
    def modules(self) -> tuple[LlamaModel, ...]:
        return tuple(chunk.module for chunk in self.chunks)

    @property
    def training_slots(self) -> list[ParameterSlot]:
        """This rank's parameters that the plan trains, in one order on all data-parallel ranks."""
        return [slot for slot in parameter_slots(self.modules) if self.plan.trains(slot.unit)]

    @contextlib.contextmanager
    def gathered_parameters(self) -> Iterator[None]:
        """Within it every rank holds the newest parameters: overlapped gathers are finished and their hooks disabled.

        Nested uses change nothing.
        """
        overlapped = self.chunks[0].ddp_config.overlap_param_gather
        overlapped = overlapped and len(self.chunks[0].remove_forward_pre_hook_handles) > 0
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
        """Prepares a step. Asserts that ``requires_grad`` is as the model was wrapped."""
        self.shards.check_flags()
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
    fp32_gradients: bool = True,
    steps_per_unit: bool = False,
    traffic: Traffic | None = None,
) -> WrappedModel:
    """Applies the plan, then builds gradient buffers and optimizer state for its trainable units only.

    Adam is torch's, or under --transformer-impl transformer_engine that of transformer-engine or Apex, whichever
    megatron-core finds. With ``steps_per_unit`` (for carried moments) it is always torch's, because the others count
    steps by parameter group; so it is under --mofo-fraction, which extends it.
    ``traffic`` is the last round's, whose counts continue; None for the first round of a run.
    """
    traffic = traffic or Traffic()
    slots = list(parameter_slots(chunks))
    apply_plan(slots, plan)
    # Only the first chunk of the first stage has more than one bucket.
    elements = sum(parameter.numel() for parameter in chunks[0].parameters() if parameter.requires_grad)
    data_size = parallel_state.get_data_parallel_world_size()
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=fp32_gradients,
        use_distributed_optimizer=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.ddp_bucket_size or default_bucket_size(elements, data_size),
        # The optimizer checks the norm of all gradients, once; here the host would wait for every bucket, twice.
        check_for_nan_in_grad=False,
    )
    config = chunks[0].config
    with traffic.lending_bucket_groups():
        wrapped = tuple(
            # Later virtual chunks reduce off the critical path: one bucket each, as Megatron does.
            _FewerPasses(config, ddp_config, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        )
    with _building_hft_optimizers(plan, slots, _torch_adam(config.transformer_impl, options, steps_per_unit)):
        optimizer = get_megatron_optimizer(
            _optimizer_config(options, parallel, dtype=config.params_dtype, bf16=bf16),
            list(wrapped),
            use_gloo_process_groups=False,
        )
    shards = _only_hft_optimizer(optimizer)
    if options.mofo_fraction is not None:
        filter_updates(shards, slots, chunks[0].shape, options.mofo_fraction)
    _connect_schedules(config, wrapped, optimizer)
    config.timers = traffic.clock.megatron_timers
    return WrappedModel(plan=plan, chunks=wrapped, optimizer=optimizer, shards=shards, traffic=traffic)


class _FewerPasses(DistributedDataParallel):
    """megatron-core's wrapper, which goes over its gradient buffers less often.

    A step does not clear them: the first gradient of each parameter overwrites the last step's. It scales only the sums
    that this rank updates, since nothing reads the others any more. For transformer-engine's kernels, which add, the
    buffers are cleared.
    """

    def __init__(self, config: Any, ddp_config: DistributedDataParallelConfig, module: LlamaModel, **options: Any):
        self._unwritten: set[Tensor] = set()
        super().__init__(config, ddp_config, module, **options)
        if config.transformer_impl != "local":
            return
        for parameter in self.param_to_bucket_group:
            parameter.unwritten_gradients = self._unwritten
        for buffer in self.buffers:
            buffer.reset = partial(self._unwritten.update, buffer.params)

    def _make_backward_post_hook(self, param: Parameter) -> Callable[..., None]:
        hook = super()._make_backward_post_hook(param)

        def clear_and_add(*unused: Any) -> None:
            """Clears the buffer of a parameter in ``_unwritten``, whose gradient is in ``grad`` and is added."""
            if param in self._unwritten:
                self._clear(param)
            hook(*unused)

        return clear_and_add

    # Either may be the first to send: pipeline schedules start a chunk's reductions themselves.
    def start_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        self._clear_unwritten()
        super().start_grad_sync(*args, **kwargs)

    def finish_grad_sync(self, *args: Any, **kwargs: Any) -> None:
        self._clear_unwritten()
        super().finish_grad_sync(*args, **kwargs)

    def _clear_unwritten(self) -> None:
        """Clears the gradients of parts of the model that this step did not use."""
        for parameter in tuple(self._unwritten):
            self._clear(parameter)

    def _clear(self, parameter: Tensor) -> None:
        parameter.main_grad.zero_()  # type: ignore[attr-defined]  # megatron-core's
        self._unwritten.discard(parameter)

    def scale_gradients(self, scaling_factor: float) -> None:
        for buffer in self.buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard_buffer(bucket.grad_data, group.size())[group.rank()].mul_(scaling_factor)


class _ClippingInPlace(ChainedOptimizer):
    """megatron-core's chain, whose clipping takes no copy of the gradients without the kernels of transformer-engine or
    Apex."""

    def step(self) -> Any:
        found = clip_grads.multi_tensor_scale_impl
        if found is local_multi_tensor_scale:
            clip_grads.multi_tensor_scale_impl = _scale_in_place
        try:
            return super().step()
        finally:
            clip_grads.multi_tensor_scale_impl = found


def _scale_in_place(chunk: int, overflow: Tensor, tensors: list[list[Tensor]], scale: float) -> None:
    """Stand-in for ``multi_tensor_scale`` for tensors that are scaled in place."""
    read, written = tensors
    assert len(read) == len(written)
    assert all(map(is_, read, written))
    torch._foreach_mul_(written, scale)


def _optimizer_config(
    options: OptimizerConfig, parallel: ParallelConfig, *, dtype: torch.dtype, bf16: bool
) -> MegatronOptimizerConfig:
    """megatron-core's own options of the optimizer; ``dtype`` is that of the weights."""
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        decoupled_lr=options.decoupled_lr,
        decoupled_min_lr=options.decoupled_min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=bf16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=parallel.overlap_param_gather,
    )


@contextlib.contextmanager
def _building_hft_optimizers(
    plan: Plan, slots: Sequence[ParameterSlot], torch_adam: type[torch.optim.AdamW] | None
) -> Iterator[None]:
    """Within it, ``get_megatron_optimizer``, which names its classes and has no hook for others, builds ours.

    ``torch_adam`` is None where it may take the Adam of transformer-engine or Apex, if they are installed.
    """
    unit_of = {slot.parameter: slot.unit for slot in slots}

    def build(*args: Any, **kwargs: Any) -> HFTDistributedOptimizer:
        return HFTDistributedOptimizer(*args, plan=plan, unit_of=unit_of, **kwargs)

    if megatron_optimizer.USING_PYTORCH_OPTIMIZER and torch_adam is None:
        torch_adam = torch.optim.AdamW
    lent: dict[str, Any] = {"DistributedOptimizer": build, "ChainedOptimizer": _ClippingInPlace}
    if torch_adam is not None:
        # megatron-core passes no options on to torch's AdamW, so ours poses as Apex's.
        lent |= {"USING_PYTORCH_OPTIMIZER": False, "Adam": partial(_torch_adamw, torch_adam)}
    own = {name: getattr(megatron_optimizer, name) for name in lent}
    try:
        vars(megatron_optimizer).update(lent)
        yield
    finally:
        vars(megatron_optimizer).update(own)


def _torch_adam(
    implementation: TransformerImpl, options: OptimizerConfig, steps_per_unit: bool
) -> type[torch.optim.AdamW] | None:
    """torch's AdamW or its extension; None where another Adam may take its place."""
    if options.mofo_fraction is not None:
        return MomentumFilteredAdamW
    return torch.optim.AdamW if steps_per_unit or implementation == "local" else None


def _torch_adamw(kind: type[torch.optim.AdamW], params: Any, *, adam_w_mode: bool, **options: Any) -> torch.optim.AdamW:
    """torch's fused AdamW in the place of Apex's: the default needs temporaries as large as its masters, and on a CPU
    three times as long."""
    assert adam_w_mode
    return kind(params, fused=True, **options)


def _only_hft_optimizer(optimizer: MegatronOptimizer) -> HFTDistributedOptimizer:
    assert isinstance(optimizer, ChainedOptimizer)
    inner = optimizer.chained_optimizers
    assert all(isinstance(one, HFTDistributedOptimizer) for one in inner), [type(one) for one in inner]
    assert len(inner) == 1, "dense models have one distributed optimizer"
    only: HFTDistributedOptimizer = inner[0]
    return only


def unwrap(wrapped: WrappedModel) -> tuple[LlamaModel, ...]:
    """Gives the parameters memory of their own again and removes everything that belongs to the round.

    ``wrapped`` is of no use after that: its parts are emptied, so that buffers and state are freed whoever still refers
    to them. The trained values are in memory twice meanwhile. Overlapped gathers are finished here, and the next
    wrapper's first forward pass makes them once more: one all-gather per round beyond those of its steps.
    """
    chunks, config = wrapped.modules, wrapped.modules[0].config
    for chunk in wrapped.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.disable_forward_pre_hook(param_sync=True)
        # The gradient accumulators hold the hooks of the round: under the next one they would swallow its gradients.
        chunk.grad_accs.clear()
    parameters = [slot.parameter for slot in parameter_slots(chunks)]
    for parameter in parameters:
        parameter.grad = None
        # A stale main_grad keeps the whole gradient buffer alive, and a tied embedding would be reduced through it.
        for name in MARKS:
            if hasattr(parameter, name):
                delattr(parameter, name)
    for name in ("no_sync_func", "grad_sync_func", "param_sync_func", "grad_scale_func", "finalize_model_grads_func"):
        setattr(config, name, None)
    for part in (*wrapped.chunks, wrapped.optimizer, wrapped.shards):
        vars(part).clear()
    # Last, so that the second copies of the weights take the place of gradients and state.
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()
    return chunks


def adam_in_use(implementation: TransformerImpl, options: OptimizerConfig, *, steps_per_unit: bool) -> str:
    """Package of the Adam that ``wrap`` takes: torch, or what megatron-core found (transformer-engine or Apex)."""
    if options.mofo_fraction is not None:
        return f"torch (MoFO: {options.mofo_fraction:g} of every matrix is updated)"
    if _torch_adam(implementation, options, steps_per_unit) is not None:
        return "torch"
    module = megatron_optimizer.Adam.__module__
    return "transformer-engine" if module.startswith("transformer_engine") else module.split(".")[0]


def _connect_schedules(config: Any, wrapped: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Gives the pipeline schedules the functions that hold back, start and finish gradient and parameter traffic."""

    def one_or_all(functions: list[Any]) -> Any:
        return functions[0] if len(functions) == 1 else functions

    config.grad_scale_func = optimizer.scale_loss
    has_adapters = wrapped[0].module.shape.adapters is not None
    config.finalize_model_grads_func = finalize_gradients if has_adapters else finalize_model_grads
    ddp_config = wrapped[0].ddp_config
    # param_sync_func stays unset: each chunk's own hooks start the next gather, bucket by bucket.
    config.no_sync_func = config.grad_sync_func = config.param_sync_func = None
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = one_or_all([chunk.no_sync for chunk in wrapped])
        config.grad_sync_func = one_or_all([chunk.start_grad_sync for chunk in wrapped])
