"""How large a checkpoint will be, by formula: no torch, no model."""

from hft_megatron.config.schema import RunConfig
from hft_megatron.hft.plan import Plan

_FP32_BYTES = 4
_BF16_BYTES = 2


def checkpoint_bytes(plan: Plan, config: RunConfig, *, bf16: bool) -> int:
    """Bytes of the tensors of one checkpoint that is saved under ``plan``; its index and plan are small beside them.

    Weights in the run's data type, and of what trains an fp32 master beside each bf16 weight and both moments; with
    --hft-resting-moments host the same of everything that has trained. Rows that pad the vocabulary are left out.
    """
    everything = plan.trainable_parameters + plan.frozen_parameters
    is_one_plan = config.hft.hft_round_interval == "stage"
    # Later rounds make a whole checkpoint first.
    leaves_out = config.checkpoint.save_trained_only and config.model.load_hf is not None and is_one_plan
    with_weights = plan.trainable_parameters if leaves_out else everything
    with_state = everything if config.hft.hft_resting_moments == "host" else plan.trainable_parameters
    state_bytes = (3 if bf16 else 2) * _FP32_BYTES
    return with_weights * (_BF16_BYTES if bf16 else _FP32_BYTES) + with_state * state_bytes
