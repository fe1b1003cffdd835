"""The distributed optimizer of a round: holds the plan, refuses resting shards, counts what it holds."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from hft_megatron.hft.plan import Plan


class HFTDistributedOptimizer(DistributedOptimizer):
    """megatron-core's ``DistributedOptimizer`` for one plan, with checkpoints that torch's AdamW can resume from.

    Its state is written by parameter in the model's own space, without regard to buckets or data-parallel shards, and
    with one step count that each parameter gets a tensor of its own from: megatron-core shares one tensor, which AdamW
    then advances once per parameter.
    """

    def __init__(self, *args: Any, plan: Plan, unit_of: dict[Parameter, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plan = plan
        self.updates = 0
        """Optimizer steps taken in this round, which is AdamW's step count of every parameter."""
        self._refuse_resting_shards(unit_of)

    @classmethod
    @torch.no_grad()
    def _build_model_and_main_param_groups(cls, *args: Any, **kwargs: Any) -> Any:
        # With gradients on, the shards of fp32 parameters would be views inside autograd's graph: torch warns whenever
        # their .grad is read, and loading a checkpoint into them is refused.
        return super()._build_model_and_main_param_groups(*args, **kwargs)

    def _refuse_resting_shards(self, unit_of: dict[Parameter, str]) -> None:
        in_buckets = {p for buffer in self._live_buffers() for bucket in buffer.buckets for p in bucket.params}
        resting = sorted(unit_of[p] for p in in_buckets if not self.plan.trains(unit_of[p]))
        assert not resting, f"resting units in gradient buckets: {resting}"
        missing = sorted(unit for p, unit in unit_of.items() if self.plan.trains(unit) and p not in in_buckets)
        assert not missing, f"training units in no gradient bucket: {missing}"

    def _live_buffers(self) -> list[Any]:
        return [] if self.is_stub_optimizer else list(self.buffers)

    def step_with_ready_grads(self) -> bool:
        successful: bool = super().step_with_ready_grads()
        self.updates += successful
        return successful

    # --- what it holds, measured on the live buffers and state

    @property
    def gradient_bytes(self) -> int:
        """Bytes of this rank's gradient buffers, padding included."""
        return sum(buffer.grad_data.nbytes for buffer in self._live_buffers())

    @property
    def master_bytes(self) -> int:
        """Bytes of fp32 master weights that this rank holds; 0 in fp32, where a parameter is its own master."""
        if self.is_stub_optimizer:
            return 0
        return sum(main.nbytes for group in self.shard_fp32_from_float16_groups for main in group)

    @property
    def moment_bytes(self) -> int:
        """Bytes of first and second moments that this rank holds now; 0 before the first update."""
        if self.is_stub_optimizer:
            return 0
        return sum(state[key].nbytes for state in self.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))

    # --- checkpoints

    def _main_param(self, model_param: Parameter) -> tuple[dict[str, Any], Tensor]:
        group_index, order = self.model_param_group_index_map[model_param]
        group = self.optimizer.param_groups[group_index]
        return group, group["params"][order]

    def _get_main_param_and_optimizer_states(self, model_param: Parameter) -> dict[str, Tensor]:
        _, main = self._main_param(model_param)
        # Before the first update there is no state yet: zeros are what AdamW would start from.
        state = self.optimizer.state.get(main, {})
        moments = {key: state.get(key, torch.zeros_like(main)) for key in ("exp_avg", "exp_avg_sq")}
        return {"param": main, **moments}

    def _set_main_param_and_optimizer_states(self, model_param: Parameter, tensors: dict[str, Tensor]) -> None:
        group, main = self._main_param(model_param)
        state = self.optimizer.state[main]
        with torch.no_grad():
            for key, value in tensors.items():
                if key == "param":
                    main.copy_(value)
                elif self.updates > 0:
                    state[key] = value.to(main.device, copy=True)
        if self.updates == 0:
            return
        if isinstance(self.optimizer, torch.optim.AdamW):
            state["step"] = torch.tensor(float(self.updates))
        else:
            group["step"] = self.updates  # Apex and transformer-engine keep it by group

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> dict[Any, Any] | None:
        """Master weights and moments of whole buffers, gathered over data-parallel ranks, padding included.

        megatron-core 0.16 leaves the padding at bucket ends out here, and then cuts parameters out at positions that
        count it: with more than one bucket, moments would go into checkpoints shifted and cut off.
        """
        with _counting_padding(self._live_buffers()):
            state: dict[Any, Any] | None = super().get_parameter_state_dp_zero(*args, **kwargs)
        return state

    def sharded_state_dict(
        self,
        model_sharded_state_dict: ShardedStateDict,
        is_loading: bool = False,
        sharding_type: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """The round's state in canonical form: ``updates`` and, per parameter, moments and (for bf16) the master."""
        if self.is_stub_optimizer:
            return {"updates": self.updates}
        tensors = self.sharded_param_state_fully_reshardable(model_sharded_state_dict, is_loading, metadata)
        if not self.config.bf16:
            for per_param in tensors.values():
                del per_param["param"]  # an fp32 parameter is its own master: the model's state holds it already
        return {"updates": self.updates, "param_state": tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state that ``sharded_state_dict`` described and dist_checkpointing filled."""
        self.updates = state_dict["updates"]
        if not self.is_stub_optimizer:
            # Absent on a rank that owns nothing to train: dist_checkpointing drops empty dictionaries.
            self.load_parameter_state_from_fully_reshardable(state_dict.get("param_state", {}))


@contextlib.contextmanager
def _counting_padding(buffers: Sequence[Any]) -> Iterator[None]:
    """Within it buffers and buckets call their padded sizes unpadded."""
    holders = [*buffers, *(bucket for buffer in buffers for bucket in buffer.buckets)]
    unpadded = [holder.numel_unpadded for holder in holders]
    for holder in holders:
        holder.numel_unpadded = holder.grad_data.numel()
    try:
        yield
    finally:
        for holder, size in zip(holders, unpadded, strict=True):
            holder.numel_unpadded = size
