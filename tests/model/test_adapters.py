"""Adapters beside matrices of both cuts against plain products in fp64, and what their dropout leaves out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor

from hft_megatron.config.adapters import Adapters
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.model.adapters import PARTIAL_MARK, LowRank, adapters_off, add_adapters
from hft_megatron.model.linear import RowParallel
from hft_megatron.parallel.groups import Placement, start_groups
from tests.model.test_shared_input_linear import ROWS, WORLD_SIZE, distance, make_problem
from tests.support.models import LAYOUTS
from tests.support.work_account import Account

RANK = 3
ADAPTERS = Adapters(rank=RANK, alpha=6.0, targets=("q_proj", "v_proj", "down_proj"))
SEQUENCE, BATCH, INPUT, OUTPUT = 6, 2, 12, 10


def started(layout: dict[str, Any]) -> tuple[Placement, bool]:
    parallel = ParallelConfig(**layout)
    return start_groups(parallel, num_layers=2, seed=1), parallel.sequence_parallel


def filled(adapter: LowRank, seed: int, *, cut: int, placement: Placement, sizes: tuple[int, int]) -> list[Tensor]:
    """Draws whole factors for a matrix of ``sizes``, gives this rank its parts, and returns the whole ones."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = sizes
    whole = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((RANK, columns), (rows, RANK))]
    cut_one = 1 - cut
    for index, (factor, value) in enumerate(zip((adapter.lora_A, adapter.lora_B), whole, strict=True)):
        is_cut = index == cut_one
        part = value.chunk(placement.tensor_size, dim=cut)[placement.tensor_rank] if is_cut else value
        factor.weight.data.copy_(part)
        assert getattr(factor.weight, PARTIAL_MARK) != is_cut
    return whole


def summed(gradient: Tensor | None, placement: Placement) -> Tensor:
    """Over tensor-parallel ranks."""
    assert gradient is not None
    total = gradient.clone()
    torch.distributed.all_reduce(total, group=placement.groups.tp)
    return total


def run_columns(layout: dict[str, Any]) -> dict[str, Any]:
    placement, splits = started(layout)
    problem = make_problem(placement, splits, [], torch.float64)
    add_adapters([problem.group], ADAPTERS, placement.tensor_rank)
    hidden, whole_input = problem.local_input.requires_grad_(), problem.local_input.detach()
    if splits:
        parts = [torch.empty_like(whole_input) for _ in range(placement.tensor_size)]
        torch.distributed.all_gather(parts, whole_input, group=placement.groups.tp)
        whole_input = torch.cat(parts)
    account = Account()
    expected, factors = list(problem.outputs), {}
    for seed, name in enumerate(("q_proj", "v_proj")):
        adapter = getattr(problem.group, name).adapter
        factors[name] = filled(adapter, seed, cut=0, placement=placement, sizes=(ROWS[name], whole_input.size(-1)))
        first, second = factors[name]
        added = 2.0 * whole_input @ first.t() @ second.t()
        index = list(ROWS).index(name)
        expected[index] = expected[index] + added.chunk(placement.tensor_size, dim=-1)[placement.tensor_rank]
    with account.watching():
        outputs = problem.group(hidden)
        forward = [event for event in account.take() if event != "product"]
        torch.autograd.backward(outputs, problem.local_upstream)
        backward = [event for event in account.take() if event != "product"]
    distances = [distance(*pair) for pair in zip(outputs, expected, strict=True)]
    for name, (first, second) in factors.items():
        upstream = problem.local_upstream[list(ROWS).index(name)].reshape(-1, ROWS[name] // placement.tensor_size)
        flat, own = whole_input.reshape(-1, whole_input.size(-1)), second.chunk(placement.tensor_size)
        adapter = getattr(problem.group, name).adapter
        through = 2.0 * upstream @ own[placement.tensor_rank]
        distances.append(distance(adapter.lora_B.weight.grad, 2.0 * upstream.t() @ (flat @ first.t())))
        expected_first = summed(through.t() @ flat, placement)
        distances.append(distance(summed(adapter.lora_A.weight.grad, placement), expected_first))
    with adapters_off([problem.group]), torch.no_grad():
        distances += [distance(*pair) for pair in zip(problem.group(hidden), problem.outputs, strict=True)]
    return {"distance": max(distances), "forward": forward, "backward": backward}


@pytest.mark.parametrize("layout", WORLD_SIZE)
def test_one_gather_and_one_sum_serve_a_group_and_its_adapters(ranks, layout):
    gathers, sums = {"tp1": ([], []), "tp2": ([], ["all_reduce"]), "tp2_sp": (["all_gather_into_tensor"],) * 2}[layout]
    for found in ranks(WORLD_SIZE[layout]).run(run_columns, layout=LAYOUTS[layout]):
        assert found["distance"] < 1e-12
        started_ones = [[e for e in found[way] if "waited" not in e] for way in ("forward", "backward")]
        assert started_ones == [gathers, sums + ["reduce_scatter_tensor"] * (layout == "tp2_sp")]


def run_rows(layout: dict[str, Any]) -> float:
    placement, splits = started(layout)
    size, rank = placement.tensor_size, placement.tensor_rank
    config = ModelParallelConfig(
        tensor_model_parallel_size=size,
        sequence_parallel=splits,
        params_dtype=torch.float64,
        perform_initialization=False,
    )
    options = {"bias": False, "input_is_parallel": True, "skip_bias_add": True, "is_expert": False}
    linear = RowParallel(
        INPUT, OUTPUT, config=config, init_method=torch.nn.init.zeros_, tp_group=placement.groups.tp, **options
    )
    holder = torch.nn.Module()
    holder.linear_fc2 = linear
    add_adapters([holder], ADAPTERS, rank)
    generator = torch.Generator().manual_seed(9)
    weight, whole_input, upstream = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((OUTPUT, INPUT), (SEQUENCE, BATCH, INPUT), (SEQUENCE, BATCH, OUTPUT))
    )
    linear.weight.data.copy_(weight.chunk(size, dim=1)[rank])
    linear.weight.requires_grad = False
    first, second = filled(linear.adapter, 7, cut=1, placement=placement, sizes=(OUTPUT, INPUT))
    hidden = whole_input.chunk(size, dim=-1)[rank].clone().requires_grad_()
    output, _ = linear(hidden)
    local = (lambda whole: whole.chunk(size)[rank]) if splits else (lambda whole: whole)
    expected = whole_input @ weight.t() + 2.0 * whole_input @ first.t() @ second.t()
    output.backward(local(upstream))
    flat, up = whole_input.reshape(-1, INPUT), upstream.reshape(-1, OUTPUT)
    gradients = [2.0 * (up @ second).t() @ flat, 2.0 * up.t() @ (flat @ first.t())]
    own_first = gradients[0].chunk(size, dim=1)[rank]
    through = upstream @ (weight + 2.0 * second @ first)
    return max(
        distance(output.detach(), local(expected)),
        distance(linear.adapter.lora_A.weight.grad, own_first),
        distance(summed(linear.adapter.lora_B.weight.grad, placement), gradients[1]),
        distance(hidden.grad, through.chunk(size, dim=-1)[rank]),
    )


@pytest.mark.parametrize("layout", WORLD_SIZE)
def test_a_row_parallel_matrix_and_its_adapter_are_plain_products(ranks, layout):
    assert max(ranks(WORLD_SIZE[layout]).run(run_rows, layout=LAYOUTS[layout])) < 1e-12


def test_dropout_leaves_out_its_share_alike_for_one_input_and_apart_for_different_columns() -> None:
    adapters = Adapters(rank=2, alpha=2.0, dropout=0.25, targets=("q_proj",))
    ones, found = torch.ones(100, 1, 64), {}
    for cut in (0, 1):
        for rank in (0, 1):
            torch.manual_seed(3)
            found[cut, rank] = LowRank(torch.empty(8, 64), adapters, cut=cut, tensor_rank=rank).dropped(ones)
    for left in found.values():
        assert left.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
        assert float((left == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(found[0, 0], found[0, 1])
    assert not torch.equal(found[1, 0], found[1, 1])
    # 1 / 0.9 in bf16 is 1.109375: multiplied by that, what is left would be 0.16 % too small.
    hidden = 1 + torch.rand(100, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    tenth = LowRank(torch.empty(8, 64), replace(adapters, dropout=0.1), cut=0, tensor_rank=0).dropped(hidden).float()
    assert float(tenth.sum() / hidden.float()[tenth != 0].sum()) == pytest.approx(1 / 0.9, rel=2e-4)
    at_rest = LowRank(torch.empty(8, 64), adapters, cut=0, tensor_rank=0).eval()
    assert at_rest.dropped(ones) is ones
