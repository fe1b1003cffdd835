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

    Its state is written by parameter in the model's own space, without regard to buckets or data-parallel shards.
    Every unit has a step count of its own, because moments that were carried over from earlier rounds are older than
    those of units that rested: under an old count the first update of a fresh unit would be about 3 times too large.
    """

    def __init__(self, *args: Any, plan: Plan, unit_of: dict[Parameter, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plan = plan
        self.updates = 0
        """Optimizer steps taken since the wrapping, or since a checkpoint was loaded into it."""
        self.start_steps: dict[str, int] = {}
        """Updates that a unit's moments had seen before those; 0 for units that are not in it."""
        self._unit_of = unit_of
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

    def check_flags(self) -> None:
        """Asserts that every parameter still has the ``requires_grad`` that the plan gave it before wrapping.

        One flipped later would cost what it cost before and still decay (frozen), or never train (unfrozen), in silence
        or in a bare assertion deep inside the reduction of gradients.
        """
        flipped = {unit for p, unit in self._unit_of.items() if p.requires_grad != (unit in self.plan.training)}
        assert not flipped, (
            f"requires_grad of {min(flipped)} was flipped after the model was wrapped for plan "
            f"{self.plan.short_digest}: what trains changes at a switch of rounds only"
        )

    def _live_buffers(self) -> list[Any]:
        return [] if self.is_stub_optimizer else list(self.buffers)

    def step_with_ready_grads(self) -> bool:
        successful: bool = super().step_with_ready_grads()
        self.updates += successful
        return successful

    def steps_of(self, unit: str) -> int:
        """AdamW's step count of a training unit; the same on every rank, whether it holds the unit or not."""
        return self.start_steps.get(unit, 0) + self.updates

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

    # --- state of whole parameters, for the next round and for checkpoints

    @property
    def state_names(self) -> tuple[str, ...]:
        """What a parameter's state consists of; an fp32 parameter is its own master."""
        return ("exp_avg", "exp_avg_sq", "param") if self.config.bf16 else ("exp_avg", "exp_avg_sq")

    def _main_param(self, model_param: Parameter) -> tuple[dict[str, Any], Tensor]:
        group_index, order = self.model_param_group_index_map[model_param]
        group = self.optimizer.param_groups[group_index]
        return group, group["params"][order]

    def take_shard(self, model_param: Parameter) -> tuple[int, dict[str, Tensor]] | None:
        """Moves this rank's shard of a parameter's state out of the optimizer, which cannot step after that.

        Returns where the shard starts in the flat parameter and (elements,) fp32 tensors by ``state_names``; None where
        this rank holds none of it.
        """
        if model_param not in self.model_param_gbuf_map:
            return None
        start: int = self._get_model_param_range_map(model_param)["param"].start
        _, main = self._main_param(model_param)
        state = self.optimizer.state.pop(main)
        return start, {name: main if name == "param" else state[name] for name in self.state_names}

    def set_shard(self, model_param: Parameter, wholes: dict[str, Tensor]) -> None:
        """Copies this rank's shard out of a parameter's whole state: flat fp32 tensors by ``state_names``."""
        if model_param not in self.model_param_gbuf_map:
            return
        held = self._get_model_param_range_map(model_param)["param"]
        shards = {name: whole[held.start : held.end] for name, whole in wholes.items()}
        self._set_main_param_and_optimizer_states(model_param, shards)

    def _get_main_param_and_optimizer_states(self, model_param: Parameter) -> dict[str, Tensor]:
        _, main = self._main_param(model_param)
        # Before the first update there is no state yet: zeros are what AdamW would start from.
        state = self.optimizer.state.get(main, {})
        moments = {key: state.get(key, torch.zeros_like(main)) for key in ("exp_avg", "exp_avg_sq")}
        return {"param": main, **moments}

    def _set_main_param_and_optimizer_states(self, model_param: Parameter, tensors: dict[str, Tensor]) -> None:
        group, main = self._main_param(model_param)
        steps = self.steps_of(self._unit_of[model_param])
        state = self.optimizer.state[main]
        with torch.no_grad():
            for key, value in tensors.items():
                if key == "param":
                    main.copy_(value)
                elif steps > 0:
                    state[key] = value.to(main.device, copy=True)
        if steps == 0:
            return
        if isinstance(self.optimizer, torch.optim.AdamW):
            # A tensor of its own: megatron-core shares one, which AdamW then advances once per parameter.
            state["step"] = torch.tensor(float(steps))
        else:
            group["step"] = steps  # Apex and transformer-engine keep it by group

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
        """The round's state in canonical form: per parameter its moments and (for bf16) its master."""
        if self.is_stub_optimizer:
            return {}
        tensors = self.sharded_param_state_fully_reshardable(model_sharded_state_dict, is_loading, metadata)
        if not self.config.bf16:
            for per_param in tensors.values():
                del per_param["param"]  # an fp32 parameter is its own master: the model's state holds it already
        return {"param_state": tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state that ``sharded_state_dict`` described and dist_checkpointing filled, ``start_steps`` old."""
        self.updates = 0
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
