"""MoFO against plain PyTorch on whole matrices, in every layout. Run: pytest tests/optimizer/test_momentum_filter.py"""

import hashlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from hft_megatron.model.parameter_names import whole_shape
from hft_megatron.model.parameters import ParameterSlot
from hft_megatron.optimizer import momentum_filter
from hft_megatron.optimizer.momentum_filter import kth_largest
from hft_megatron.parallel.groups import Placement
from hft_megatron.trainer.run import Run
from tests.support.models import make_llama
from tests.support.operator_calls import OperatorCalls
from tests.support.plain_run import plain_run
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for
from tests.support.toy_training import OPTIMIZER, TINY, local_weights, make_run, take_steps

ODD = {**TINY, "vocab_size": 97}
"""Tensor parallelism pads this vocabulary."""
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 3000}
FRACTION = 0.15


def whole_state(run: Run) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """unit -> master weight and both moments of what trains here, as Hugging Face has the matrix; collective."""
    shards, groups, found = run.wrapped.shards, run.placement.groups, {}
    for slot in run.wrapped.training_slots:
        local = torch.zeros(3, slot.parameter.numel())
        held, state = shards.range_of(slot.parameter), shards.shard_of(slot.parameter)
        if held is not None:
            assert state is not None
            master = shards.updated_shards()[slot.parameter]
            local[:, held] = torch.stack([master, state[1]["exp_avg"], state[1]["exp_avg_sq"]])
        dist.all_reduce(local, group=groups.dp)
        found[slot.unit] = tuple(_joined(part.view(slot.parameter.shape), slot, run.placement) for part in local)
    shape = run.wrapped.modules[0].shape
    for unit, tensors in found.items():
        rows = whole_shape(unit, shape)[0]
        assert all(not tensor[rows:].any() for tensor in tensors), "what pads the vocabulary stays zero"
        found[unit] = tuple(tensor[:rows] for tensor in tensors)
    return found


def _joined(local: Tensor, slot: ParameterSlot, placement: Placement) -> Tensor:
    if slot.cut is None:
        return local
    parts = [torch.empty_like(local) for _ in range(placement.tensor_size)]
    dist.all_gather(parts, local.contiguous(), group=placement.groups.tp)
    return torch.cat(parts, dim=slot.cut)


def run_beside_the_rule(folder: str, layout: dict[str, Any], ratio: float, bf16: bool) -> dict[str, list[float]]:
    """By unit, after each of four steps, the share of the entries that moved, which must be those of the rule."""
    run = make_run(
        folder,
        layout,
        ratio=ratio,
        training={"bf16": bf16},
        optimizer={"mofo_fraction": FRACTION, "lr_warmup_iters": 0},
    )
    betas = OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2
    moved: dict[str, list[float]] = {}
    for count in range(1, 5):
        before = whole_state(run)
        take_steps(run, 1)
        rate = run.learning_rate.last
        for unit, (after, first, second) in whole_state(run).items():
            size = first.abs()
            kept = size >= size.flatten().topk(int(size.numel() * FRACTION)).values[-1]
            decay = OPTIMIZER.weight_decay
            if first.dim() == 1:
                kept, decay = torch.ones_like(kept), 0.0
            frozen = before[unit][0] * (1 - rate * decay)
            root = second.sqrt() / (1 - betas[1] ** count) ** 0.5 + OPTIMIZER.adam_eps
            expected = torch.where(kept, frozen - rate / (1 - betas[0] ** count) * first / root, frozen)
            assert torch.equal(after[~kept], frozen[~kept]), unit
            assert torch.equal(after != frozen, kept & (first != 0)), unit
            assert float((after - expected).abs().max()) < 1e-6, unit
            moved.setdefault(unit, []).append(float((after != frozen).double().mean()))
    return moved


@pytest.mark.engine
@pytest.mark.slow(reason="four ranks, and whole matrices gathered in every step")
@pytest.mark.parametrize("bf16", [False, True])
def test_entries_that_move_are_those_of_the_whole_matrix_under_tp_and_dp(
    bf16: bool, ranks: RankPools, tmp_path: Path
) -> None:
    folder = str(make_llama(tmp_path / "model", **ODD))
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, **OVERLAP}
    one, *others = ranks(4).run(run_beside_the_rule, folder=folder, layout=layout, ratio=0.5, bf16=bf16)
    assert one.keys() >= {"model.embed_tokens", "model.norm", "lm_head"}
    assert all(other == one for other in others)
    for unit, shares in one.items():
        assert shares == pytest.approx([1.0 if "norm" in unit else FRACTION] * 4, abs=0.01), unit


@pytest.mark.slow(reason="two ranks, and whole matrices gathered in every step")
def test_both_ends_of_a_pipeline_move_the_same_entries_of_a_tied_embedding(ranks: RankPools, tmp_path: Path) -> None:
    folder = str(make_llama(tmp_path / "model", "tied", **ODD))
    layout = {"pipeline_model_parallel_size": 2}
    first, last = ranks(2).run(run_beside_the_rule, folder=folder, layout=layout, ratio=1.0, bf16=False)
    shared = first.keys() & last.keys()
    assert shared == {"model.embed_tokens"}
    assert all(first[unit] == last[unit] for unit in shared)


def run_weights(
    folder: str, layout: dict[str, Any], optimizer: dict[str, Any], bf16: bool, most: int | None = None
) -> dict[str, str]:
    """sha256 of this rank's weights, masters and moments after five steps; ``most`` elements are updated together."""
    with patch.object(momentum_filter, "MOST_ELEMENTS", most or momentum_filter.MOST_ELEMENTS):
        run = make_run(folder, layout, training={"bf16": bf16}, optimizer=optimizer)
    with patch.object(momentum_filter, "CHUNK", 50 if most else momentum_filter.CHUNK):
        take_steps(run, 5)
    found = {f"{unit} {name}": weight for (unit, name), weight in local_weights(run).items()}
    for unit, tensors in whole_state(run).items():
        found |= {f"{unit} {number}": tensor for number, tensor in enumerate(tensors)}
    return {name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in found.items()}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.slow(reason="nine runs")
@pytest.mark.parametrize("bf16", [False, True])
def test_all_of_a_matrix_is_adamw_and_neither_overlap_nor_parts_change_a_bit(
    bf16: bool, ranks: RankPools, tmp_path: Path
) -> None:
    folder = str(make_llama(tmp_path / "model", **ODD))

    def run(layout: dict[str, Any], fraction: float | None, most: int | None = None) -> list[dict[str, str]]:
        return ranks(2).run(
            run_weights,
            folder=folder,
            layout=layout,
            # The norm of the gradients is a sum in the order of the buckets, for AdamW too.
            optimizer={"mofo_fraction": fraction, "clip_grad": 0.0},
            bf16=bf16,
            most=most,
        )

    adamw, some = run(OVERLAP, None), run(OVERLAP, FRACTION)
    assert run(OVERLAP, 1.0) == adamw
    assert some != adamw
    assert run({}, FRACTION) == run(OVERLAP, FRACTION, most=4000) == some
    if not bf16:
        tp = {"tensor_model_parallel_size": 2}
        assert run(tp, 1.0) == run(tp, None)


@pytest.mark.engine
@pytest.mark.slow(reason="a run on four ranks, and its reference")
def test_a_whole_run_at_tp_2_and_dp_2_is_plain_pytorchs(ranks: RankPools, tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, **TINY)
    words = words_for(inputs, "--mofo-fraction", FRACTION, "--adam-eps", 1e-5, "--clip-grad", 1.0)
    layout = ["--tensor-model-parallel-size", "2", "--save-hf", str(tmp_path / "out")]
    answers = ranks(4).run(run_sft_words, words=[*words, *layout])
    assert any("Adam by torch (MoFO: 0.15 of every matrix is updated)" in line for line in answers[0]["said"])
    expected, full = plain_run("sft", words, ""), plain_run("sft", words_for(inputs, "--adam-eps", 1e-5), "")
    losses = [step["loss"] for step in answers[-1]["steps"]]
    assert losses == pytest.approx([step.loss for step in expected.steps], rel=1e-5)
    assert losses[-1] != pytest.approx(full.steps[-1].loss, rel=1e-2), "else the rule would show in nothing"
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in expected.weights.items():
        assert float((exported[name] - weight).abs().max()) < 1e-6, name


@pytest.mark.slow(reason="two runs, and their reference")
def test_a_stage_where_nothing_trains_takes_no_part_and_virtual_stages_filter_their_own(
    ranks: RankPools, tmp_path: Path
) -> None:
    inputs = make_inputs(tmp_path, **TINY)
    frozen = ["--hft-freeze-embedding", "--hft-freeze", "model.layers.0.*,model.layers.1.*"]
    virtual = ["--num-layers-per-virtual-pipeline-stage", "1", "--micro-batch-size", "1"]
    for options in (frozen, virtual):
        words = words_for(inputs, "--mofo-fraction", FRACTION, "--adam-eps", 1e-5, *options)
        answers = ranks(2).run(run_sft_words, words=[*words, "--pipeline-model-parallel-size", "2"])
        losses = [step.loss for step in plain_run("sft", words, "").steps]
        assert [step["loss"] for step in answers[-1]["steps"]] == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow(reason="three runs")
def test_a_run_resumes_to_the_bit_over_rounds_of_its_own(ranks: RankPools, tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, **TINY)
    rounds = ["--hft-round-interval", "2", "--hft-moments", "carry", "--bf16", "--overlap-grad-reduce"]
    words = words_for(inputs, "--mofo-fraction", FRACTION, *rounds)
    saved = [*words, "--save", str(tmp_path / "run"), "--load", str(tmp_path / "run")]
    whole = ranks(2).run(run_sft_words, words=words)
    assert ranks(2).run(run_sft_words, words=saved, kill_at=3)[0]["stopped"]
    second = ranks(2).run(run_sft_words, words=saved)
    assert [rank["state"] for rank in second] == [rank["state"] for rank in whole]
    assert [rank["steps"] for rank in second] == [rank["steps"][3:] for rank in whole]


def hard_values() -> list[Tensor]:
    """Matrices with equal entries, zeros of both signs, denormals, infinities, and none but one value."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(1001, generator=generator)
    spread = normal * 10.0 ** torch.randint(-44, 38, (1001,), generator=generator)
    rounded = (normal * 4).round() / 4
    rounded[::7] = -0.0
    extreme = torch.tensor([float("inf"), -float("inf"), 1e-45, -1e-45, 3.4e38, 0.0, 1.0, -1.0, 2.0])
    return [normal, spread, rounded, extreme, torch.zeros(64), torch.full((65,), -0.3)]


def run_thresholds() -> list[list[list[int]]]:
    """By matrix and rank asked for: the bits found, and those of a sort of the whole."""
    group, found = dist.group.WORLD, []
    values = hard_values()
    # The first of two ranks has none of the last matrix; of the others an odd part.
    cuts = [len(one) // 3 for one in values[:-1]] + [0]
    parts = [one[:cut] if dist.get_rank() == 0 else one[cut:] for one, cut in zip(values, cuts, strict=True)]
    held = [part.clone() if part.numel() else None for part in parts]
    for asked in ([1] * 6, [len(one) for one in values], [1 + len(one) // 6 for one in values]):
        bits = kth_largest(held, asked, group).tolist()
        sizes = [one.abs().sort(descending=True).values for one in values]
        exact = [int(size[k - 1].view(torch.int32)) for size, k in zip(sizes, asked, strict=True)]
        found.append([bits, exact])
    return found


def test_the_kth_largest_of_parts_on_several_ranks_is_that_of_a_sort(ranks: RankPools) -> None:
    for answer in ranks(2).run(run_thresholds):
        assert all(bits == exact for bits, exact in answer)


def run_counted(folder: str, fraction: float | None) -> dict[str, Any]:
    """Of one step: sums over ranks with their bytes, and operators that read all entries of a moment."""
    run = make_run(folder, {}, ratio=1.0, optimizer={"mofo_fraction": fraction})
    take_steps(run, 1)
    sums: list[int] = []
    original = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sums.append(tensor.nbytes)
        return original(tensor, *args, **options)

    with patch.object(momentum_filter.dist, "all_reduce", counted), OperatorCalls() as calls:
        run.wrapped.shards.optimizer.step()
    matrices = sum(slot.parameter.dim() > 1 for slot in run.wrapped.training_slots)
    held = sum(run.wrapped.shards.range_of(slot.parameter) is not None for slot in run.wrapped.training_slots)
    return {"sums": sums, "matrices": matrices, "held": held, "calls": calls.calls, "reads": calls.reads}


def test_a_step_has_three_sums_of_32_kib_for_each_matrix_and_counts_every_moment_three_times(
    ranks: RankPools, tmp_path: Path
) -> None:
    folder = str(make_llama(tmp_path / "model", **TINY, num_hidden_layers=2))
    assert all(not answer["sums"] for answer in ranks(2).run(run_counted, folder=folder, fraction=None))
    for answer in ranks(2).run(run_counted, folder=folder, fraction=FRACTION):
        matrices = answer["matrices"]
        assert answer["sums"] == [matrices * bins * 8 for bins in (2048, 1024, 1024)]
        assert sum(answer["sums"]) == 32 * 1024 * matrices
        held = answer["calls"]["clone"]  # one for each matrix of which the rank updates a part
        assert 0 < held <= matrices
        assert answer["calls"]["bincount"] == 3 * held
        assert answer["calls"]["where"] == held


def test_a_checkpoint_of_a_run_with_another_fraction_is_another_run(tmp_path: Path) -> None:
    from hft_megatron.config.optimizer import OptimizerConfig
    from hft_megatron.config.run import RunConfig
    from hft_megatron.config.run_identity import differences, run_identity
    from tests.support.shapes import tiny_shape

    def identity(fraction: float | None) -> Any:
        options = RunConfig(optimizer=OptimizerConfig(mofo_fraction=fraction))
        return run_identity(options, tiny_shape(2), 1, method="sft", data_digest="0")

    assert differences(identity(None), identity(0.15)) == [("--mofo-fraction", None, 0.15)]
