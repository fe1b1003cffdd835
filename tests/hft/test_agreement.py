"""Agreement over real gloo ranks: nobody errs alone, and the odd rank is named."""

import socket
from dataclasses import replace

import torch.distributed as dist

from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.errors import UserError
from hft_megatron.hft.on_ranks import check_agreement
from hft_megatron.hft.plan import Plan, make_plan
from tests.support.ranks import RankPools

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=11,
    max_position_embeddings=16,
)
UNIT = "model.layers.1.mlp.up_proj"


def tampered(plan: Plan, tampering: str) -> Plan:
    if tampering == "unit":
        return replace(plan, training=plan.training ^ {UNIT})
    if tampering == "seed":
        return replace(plan, policy=replace(plan.policy, seed=plan.policy.seed + 1))
    assert tampering == "model"
    return make_plan(replace(SHAPE, ffn_hidden_size=17), HFTConfig(), default_seed=0)


def run_check(tampered_rank: int | None, tampering: str, member_ranks: list[int] | None) -> str | None:
    """Check with one rank's plan tampered with; the sentence it raises, or None. Then prove the ranks still talk."""
    plan = make_plan(SHAPE, HFTConfig(), default_seed=0)
    rank = dist.get_rank()
    if rank == tampered_rank:
        plan = tampered(plan, tampering)
    group = None if member_ranks is None else dist.new_group(member_ranks)
    message = None
    try:
        if member_ranks is None or rank in member_ranks:
            check_agreement(plan, group=group, coordinates=f"TP {rank % 2}, PP {rank // 2}, DP 0")
    except UserError as error:
        message = str(error)
    dist.barrier()
    return message


def check(ranks: RankPools, world: int, *, rank: int | None, tampering: str = "unit") -> list[str | None]:
    values: list[str | None] = ranks(world).run(run_check, tampered_rank=rank, tampering=tampering, member_ranks=None)
    return values


def test_equal_plans_pass(ranks: RankPools) -> None:
    assert check(ranks, 2, rank=None) == [None, None]


def test_a_tampered_rank_of_two_is_named_with_host_coordinates_and_unit_on_both_ranks(ranks: RankPools) -> None:
    messages = check(ranks, 2, rank=1)
    here, there = ("trainable", "frozen")
    if make_plan(SHAPE, HFTConfig(), default_seed=0).trains(UNIT):
        here, there = there, here
    assert messages[0] == messages[1]
    assert messages[0] == (
        f"1 of 2 ranks have another plan than rank 0: rank 1 on {socket.gethostname()} (TP 1, PP 0, DP 0) differs "
        f"first in {UNIT}, which is {here} there instead of {there}; "
        "start every rank with the same options, files and version of hft_megatron."
    )


def test_the_majority_is_right_and_not_rank_zero(ranks: RankPools) -> None:
    messages = check(ranks, 4, rank=0)
    assert len(set(messages)) == 1
    assert f"than rank 1: rank 0 on {socket.gethostname()} (TP 0, PP 0, DP 0) differs first in {UNIT}" in str(
        messages[0]
    )


def test_a_tampered_seed_is_named_although_the_same_units_train(ranks: RankPools) -> None:
    assert "rank 1" in (message := str(check(ranks, 2, rank=1, tampering="seed")[0]))
    assert "differs first in seed;" in message


def test_a_plan_of_another_model_is_named_by_the_unit_of_another_size(ranks: RankPools) -> None:
    message = str(check(ranks, 2, rank=1, tampering="model")[0])
    assert "differs first in the size of model.layers.0.mlp.gate_proj" in message


def test_a_subgroup_is_checked_alone(ranks: RankPools) -> None:
    messages = ranks(4).run(run_check, tampered_rank=3, tampering="unit", member_ranks=[0, 2, 3])
    assert messages[1] is None
    assert messages[0] == messages[2] == messages[3]
    assert "1 of 3 ranks have another plan than rank 0: rank 3 on" in messages[0]
