"""Matrices over one input against plain products in fp64: values, and the work and memory that freezing saves."""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor

from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.model.linear import SharedInputColumnParallel
from hft_megatron.parallel.groups import Placement, start_groups
from tests.support.models import LAYOUTS
from tests.support.work_account import Account

ROWS = {"q_proj": 12, "k_proj": 4, "v_proj": 8}
SEQUENCE, BATCH, HIDDEN = 6, 2, 10
SUBSETS = [
    [name for name, flag in zip(ROWS, flags, strict=True) if flag] for flags in itertools.product([0, 1], repeat=3)
]
WORLD_SIZE = {"tp1": 1, "tp2": 2, "tp2_sp": 2}


@dataclass
class Problem:
    """A group on this rank and what plain products give for it; every rank draws the same whole tensors."""

    group: SharedInputColumnParallel
    local_input: Tensor
    local_upstream: list[Tensor]
    outputs: list[Tensor]
    input_gradient: Tensor
    weight_gradients: dict[str, Tensor]


def make_problem(placement: Placement, sequence_parallel: bool, training: list[str], dtype: torch.dtype) -> Problem:
    rank, size = placement.tensor_rank, placement.tensor_size
    generator = torch.Generator().manual_seed(5)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    whole_input = draw(SEQUENCE, BATCH, HIDDEN).to(dtype)
    weights = {name: draw(rows, HIDDEN).to(dtype) for name, rows in ROWS.items()}
    # Consumers permute heads, so gradients don't arrive contiguous.
    upstream = {name: draw(BATCH, SEQUENCE, rows).to(dtype).transpose(0, 1) for name, rows in ROWS.items()}

    config = ModelParallelConfig(
        tensor_model_parallel_size=size,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        perform_initialization=False,
    )
    group = SharedInputColumnParallel(
        config, input_size=HIDDEN, rows=ROWS, init_method=torch.nn.init.zeros_, tp_group=placement.groups.tp
    )
    for name, weight in weights.items():
        parameter = getattr(group, name).weight
        parameter.requires_grad = name in training
        parameter.data.copy_(weight.chunk(size)[rank])

    def local_rows(whole: Tensor) -> Tensor:
        return whole.chunk(size, dim=-1)[rank]

    def local_positions(whole: Tensor) -> Tensor:
        return whole.chunk(size)[rank] if sequence_parallel else whole

    flat = whole_input.reshape(-1, HIDDEN)
    gradient = sum(upstream[name] @ weights[name] for name in ROWS)
    assert isinstance(gradient, Tensor)
    return Problem(
        group=group,
        local_input=local_positions(whole_input).clone(),
        local_upstream=[local_rows(upstream[name]) for name in ROWS],
        outputs=[local_rows(whole_input @ weights[name].t()) for name in ROWS],
        input_gradient=local_positions(gradient),
        weight_gradients={name: local_rows(upstream[name]).reshape(flat.size(0), -1).t() @ flat for name in training},
    )


def distance(one: Tensor | None, other: Tensor) -> float:
    assert one is not None
    assert one.shape == other.shape
    return (one - other).abs().max().item()


def run_subset(placement: Placement, sequence_parallel: bool, training: list[str], input_trains: bool) -> dict:
    problem = make_problem(placement, sequence_parallel, training, torch.float64)
    weights = {name: getattr(problem.group, name).weight for name in ROWS}
    hidden = problem.local_input.requires_grad_(input_trains)
    account = Account()
    with account.watching():
        outputs = problem.group(hidden)
        forward = account.take()
        kept = account.kept_besides(*weights.values())
        if outputs[0].requires_grad:
            torch.autograd.backward(outputs, problem.local_upstream)
    backward = account.take()
    distances = [distance(*pair) for pair in zip(outputs, problem.outputs, strict=True)]
    distances += [distance(weights[name].grad, expected) for name, expected in problem.weight_gradients.items()]
    if input_trains:
        distances.append(distance(hidden.grad, problem.input_gradient))
    return {
        "distance": max(distances),
        "has graph": outputs[0].requires_grad,
        "forward": forward,
        "backward": backward,
        "kept besides weights": kept,
        "frozen gradients": [name for name in ROWS if name not in training and weights[name].grad is not None],
    }


def run_every_subset(layout: dict[str, Any]) -> list[dict[str, Any]]:
    parallel = ParallelConfig(**layout)
    placement = start_groups(parallel, num_layers=2, seed=1)
    return [
        run_subset(placement, parallel.sequence_parallel, training, input_trains)
        for training in SUBSETS
        for input_trains in (True, False)
    ]


@pytest.fixture(scope="module")
def accounts(ranks):
    """``accounts(layout)``: (training members, whether the input trains, account) of every case on every rank."""
    done: dict[str, list[tuple[list[str], bool, dict]]] = {}

    def account(layout: str) -> list[tuple[list[str], bool, dict]]:
        if layout not in done:
            per_rank = ranks(WORLD_SIZE[layout]).run(run_every_subset, layout=LAYOUTS[layout])
            cases = list(itertools.product(SUBSETS, (True, False)))
            done[layout] = [(*case, row) for rows in per_rank for case, row in zip(cases, rows, strict=True)]
        return done[layout]

    return account


@pytest.mark.parametrize("layout", WORLD_SIZE)
def test_outputs_and_gradients_equal_plain_products_for_every_subset_of_training_members(accounts, layout):
    for training, input_trains, row in accounts(layout):
        assert row["distance"] < 1e-12, (training, input_trains)
        assert row["frozen gradients"] == [], training
        assert row["has graph"] == bool(training or input_trains)


@pytest.mark.parametrize("layout", WORLD_SIZE)
def test_nothing_but_weights_is_kept_when_every_member_rests_and_else_only_this_ranks_input(accounts, layout):
    positions = SEQUENCE // (2 if layout == "tp2_sp" else 1)
    for training, _, row in accounts(layout):
        assert row["kept besides weights"] == ([[positions, BATCH, HIDDEN]] if training else []), training


@pytest.mark.parametrize("layout", WORLD_SIZE)
def test_weight_gradients_of_frozen_members_are_never_computed(accounts, layout):
    for training, input_trains, row in accounts(layout):
        assert row["forward"].count("product") == len(ROWS)
        assert row["backward"].count("product") == len(ROWS) * input_trains + len(training), (training, input_trains)


@pytest.mark.parametrize("layout", WORLD_SIZE)
def test_each_direction_gathers_once_at_most_and_weight_gradients_hide_the_one_reduction(accounts, layout):
    gather = ["all_gather_into_tensor"] if layout == "tp2_sp" else []
    reduce = {"tp1": [], "tp2": ["all_reduce"], "tp2_sp": ["reduce_scatter_tensor"]}[layout]
    gathered, reduced = ([f"{name} waited for" for name in names] for names in (gather, reduce))
    for training, input_trains, row in accounts(layout):
        assert row["forward"] == gather + gathered + ["product"] * len(ROWS)
        expected = gather * bool(training)
        expected += (["product"] * len(ROWS) + reduce) * input_trains
        expected += (gathered + ["product"] * len(training)) * bool(training)
        expected += reduced * input_trains
        assert row["backward"] == expected, (training, input_trains)


def run_main_grad(dtype: str) -> dict[str, Any]:
    """Two backward passes into an fp32 (or fp64) ``main_grad`` of a group with one member at rest."""
    placement = start_groups(ParallelConfig(), num_layers=2, seed=1)
    problem = make_problem(placement, False, ["q_proj", "v_proj"], getattr(torch, dtype))
    received: dict[str, list[bool]] = {"q_proj": [], "v_proj": []}
    for name, gradients in received.items():
        weight = getattr(problem.group, name).weight
        weight.main_grad = torch.ones_like(weight, dtype=torch.float32 if dtype == "bfloat16" else weight.dtype)
        weight.grad_added_to_main_grad = False
        weight.register_hook(lambda gradient, gradients=gradients: gradients.append(gradient is not None))
    for _ in range(2):
        torch.autograd.backward(problem.group(problem.local_input), problem.local_upstream)
    weights = {name: getattr(problem.group, name).weight for name in received}
    return {
        "received": received,
        "added": [weight.grad_added_to_main_grad for weight in weights.values()],
        "distance": max(
            distance(weight.main_grad, 1 + 2 * problem.weight_gradients[name].to(weight.main_grad.dtype))
            / problem.weight_gradients[name].abs().max().item()
            for name, weight in weights.items()
        ),
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-13), ("float32", 1e-5), ("bfloat16", 1e-2)])
def test_weight_gradients_add_to_main_grad_and_a_gradient_still_reaches_the_hook(ranks, dtype, tolerance):
    (answer,) = ranks(1).run(run_main_grad, dtype=dtype)
    assert answer["distance"] < tolerance
    assert answer["added"] == [True, True]
    assert answer["received"] == {"q_proj": [True, True], "v_proj": [True, True]}
