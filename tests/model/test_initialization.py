"""Random weights are the same model on every layout. Run: pytest tests/model/test_initialization.py"""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.training import TrainingConfig
from tests.support.models import LAYOUTS
from tests.support.ranks import RankPools
from tests.support.tiers import quick

STD = 0.05
SHAPE = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 112,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 24,
    "vocab_size": 333,
    "max_position_embeddings": 64,
    "init_method_std": STD,
}


def run_initialize(
    layout: str, output: str, seed: int, tied: bool = False, vocab_multiple: int = 1, bf16: bool = False
) -> list[int]:
    """Initialises a model and writes it as Hugging Face has it; returns the padded rows of each vocabulary matrix."""
    from hft_megatron.conversion.save import ExportRules, gathered_weights, write_weights
    from hft_megatron.model.build import build_model, initialize_weights
    from hft_megatron.model.parameters import parameter_slots
    from hft_megatron.parallel.groups import start_groups

    shape = ModelShape(**SHAPE, tie_embeddings=tied)
    parallel = ParallelConfig(**LAYOUTS[layout])
    placement = start_groups(parallel, shape.num_layers, seed=1)
    dtype = torch.bfloat16 if bf16 else torch.float32
    chunks = build_model(
        shape, parallel, TrainingConfig(), placement=placement, dtype=dtype, vocab_multiple=vocab_multiple
    )
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(7.0)  # what is left out shows
    initialize_weights(chunks, shape, seed=seed, placement=placement)
    padded = []
    for slot in parameter_slots(chunks):
        if slot.is_vocab:
            rows = slot.parameter.size(0)
            real = max(0, min(rows, shape.vocab_size - placement.tensor_rank * rows))
            assert (slot.parameter[real:] == 0).all(), slot.local_name
            assert not (slot.parameter[:real] == 0).all(dim=1).any(), slot.local_name
            padded.append(rows - real)
    Path(output).mkdir(exist_ok=True)  # the first rank to come
    wholes = gathered_weights(chunks, shape, placement)
    if placement.rank == 0:
        rules = ExportRules(source=None, trained=frozenset(), save_dtype=None)
        write_weights(Path(output), wholes, shape, dtype, rules, print)
    else:
        assert list(wholes) == []
    return padded


def written(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tied", quick([False, True], [False]))
def test_one_seed_gives_one_model_at_every_layout(tied: bool, ranks: RankPools, tmp_path: Path) -> None:
    world_sizes = {"tp1": 1, "tp2": 2, "pp2": 2, "pp2_vpp": 2, "tp2_pp2": 4}
    for layout, world_size in world_sizes.items():
        ranks(world_size).run(run_initialize, layout=layout, output=str(tmp_path / layout), seed=5, tied=tied)
    expected = written(tmp_path / "tp1")
    assert ("lm_head.weight" in expected) != tied
    for layout in world_sizes:
        found = written(tmp_path / layout)
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == [], layout


def test_matrices_have_the_asked_spread_and_norms_are_one(ranks: RankPools, tmp_path: Path) -> None:
    ranks(1).run(run_initialize, layout="tp1", output=str(tmp_path / "a"), seed=5)
    for name, tensor in written(tmp_path / "a").items():
        if tensor.dim() == 1:
            assert (tensor == 1).all(), name
            continue
        # Megatron's residual scaling by the number of branches, two per layer.
        expected = STD / math.sqrt(2 * 4) if name.endswith(("o_proj.weight", "down_proj.weight")) else STD
        tolerance = 5 / math.sqrt(2 * tensor.numel())  # five standard errors of a standard deviation
        assert tensor.std().item() == pytest.approx(expected, rel=tolerance), name
        assert abs(tensor.mean().item()) < 5 * expected / math.sqrt(tensor.numel()), name


def test_another_seed_gives_another_model_and_no_two_matrices_are_equal(ranks: RankPools, tmp_path: Path) -> None:
    for seed in (5, 6):
        ranks(1).run(run_initialize, layout="tp1", output=str(tmp_path / str(seed)), seed=seed)
    one, other = written(tmp_path / "5"), written(tmp_path / "6")
    matrices = [name for name in one if one[name].dim() == 2]
    assert not [name for name in matrices if torch.equal(one[name], other[name])]
    first_rows = {tuple(one[name][0, :8].tolist()) for name in matrices}
    assert len(first_rows) == len(matrices)


def test_padded_rows_are_zero_and_change_no_other_row(ranks: RankPools, tmp_path: Path) -> None:
    plain = ranks(1).run(run_initialize, layout="tp1", output=str(tmp_path / "plain"), seed=5)
    padded = ranks(2).run(run_initialize, layout="tp2", output=str(tmp_path / "padded"), seed=5, vocab_multiple=256)
    assert plain == [[0, 0]]
    assert padded == [[0, 0], [512 - 333] * 2]
    one, other = written(tmp_path / "plain"), written(tmp_path / "padded")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_bf16_weights_are_the_fp32_ones_rounded(ranks: RankPools, tmp_path: Path) -> None:
    for bf16 in (False, True):
        ranks(1).run(run_initialize, layout="tp1", output=str(tmp_path / str(bf16)), seed=5, bf16=bf16)
    exact, rounded = written(tmp_path / "False"), written(tmp_path / "True")
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
