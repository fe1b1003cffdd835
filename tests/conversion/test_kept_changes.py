"""FAPM, DARE and TIES by hand, to the bit and tensor by tensor. Run: pytest tests/conversion/test_kept_changes.py"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.conversion.kept_changes import drop_changes, is_safe, keep_safe_changes, merge_changes
from hft_megatron.conversion.merge_inputs import MergeFolders, MergeInputs, check_folders
from hft_megatron.conversion.merging import average_path
from hft_megatron.conversion.shard_writer import ShardWriter
from hft_megatron.hft.units import units_of
from hft_megatron.model.parameter_names import whole_shape
from tests.support.pairs import make_pair, read_weights, same_bits
from tests.support.peak_memory import PeakMemory
from tests.support.ranks import REPOSITORY

MATRIX = "model.layers.1.mlp.up_proj.weight"


def inputs_of(pair: Path, output: Path, tuned: str = "tuned") -> MergeInputs:
    return check_folders(MergeFolders(tuned=str(pair / tuned), base=str(pair / "base"), output=str(output)))


def fapm(pair: Path, output: Path, sparsity: float) -> dict[str, Tensor]:
    keep_safe_changes(inputs_of(pair, output), sparsity, lambda line: None)
    return read_weights(output)


def dare(pair: Path, output: Path, rate: float, seed: int = 1) -> dict[str, Tensor]:
    drop_changes(inputs_of(pair, output), rate, seed, lambda line: None)
    return read_weights(output)


def ties(pair: Path, output: Path, density: float, coefficient: float = 1.0, *others: str) -> dict[str, Tensor]:
    inputs = [inputs_of(pair, output, name) for name in ("tuned", *others)]
    merge_changes(inputs, density, coefficient, lambda line: None)
    return read_weights(output)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("pair"))


def hand_made(folder: Path, base: list[float], **models: list[float]) -> Path:
    """Models whose ``MATRIX`` begins with these values; nothing else differs."""
    make_pair(folder)
    weights = read_weights(folder / "base")
    weights[MATRIX].fill_(1.0)
    for name, values in {"base": base, **models}.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())
        mine = {key: tensor.clone() for key, tensor in weights.items()}
        mine[MATRIX][0, : len(values)] = torch.tensor(values)
        save_file(mine, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_fapm_keeps_by_the_formula_what_numpy_keeps(pair: Path, tmp_path: Path) -> None:
    merged = fapm(pair, tmp_path / "out", 0.9)
    base, tuned = read_weights(pair / "base"), read_weights(pair / "tuned")
    for name, tensor in merged.items():
        if tensor.dim() == 1:
            assert same_bits(tensor, tuned[name]), name
            continue
        old, new = base[name].double().numpy(), tuned[name].double().numpy()
        change = np.abs(new - old)
        score = change - np.abs(old).mean() * change / np.abs(old)
        kept = (tensor == tuned[name]).numpy()
        assert kept.sum() == round(0.1 * kept.size)
        assert (kept | (tensor == base[name]).numpy()).all()
        # In fp32, two scores as near as its last bits may change places.
        assert score[kept].min() > score[~kept].max() - 1e-5
    assert json.loads((tmp_path / "out" / "fapm.json").read_text())["sparsity"] == 0.9


def test_fapm_of_a_small_matrix_by_hand() -> None:
    """mean(|W0|) is 2: S = |tau| (1 - 2 / |W0|)."""
    base = torch.tensor([[4.0, -4.0, 2.0, 1.0], [0.0, 0.0, -1.0, 4.0]])
    tau = torch.tensor([[1.0, 1.0, 9.0, 0.5], [3.0, 0.0, -2.0, -3.0]])
    # S: 0.5, 0.5, 0, -0.5; -inf, -inf, -2, 1.5
    for kept, expected in (
        (1, [[0, 0, 0, 0], [0, 0, 0, 1]]),
        (2, [[1, 1, 0, 0], [0, 0, 0, 1]]),  # two are equal
        (4, [[1, 1, 1, 0], [0, 0, 0, 1]]),
        (6, [[1, 1, 1, 1], [0, 0, 1, 1]]),
        (7, [[1, 1, 1, 1], [1, 1, 1, 1]]),  # where the base is 0, changed or not
        (0, [[0, 0, 0, 0], [0, 0, 0, 0]]),
    ):
        found = is_safe(base + tau, base, 1 - kept / 8)
        assert found.int().tolist() == expected, kept


def test_fapm_of_a_base_that_is_all_but_zero_stays_a_number() -> None:
    base = torch.tensor([[1e-45, 1e-45, 1.0, 3.0]])
    tuned = torch.tensor([[1e-45, 1.0, 1.0, 4.0]])
    assert is_safe(tuned, base, 0.75).tolist() == [[False, False, False, True]]
    assert is_safe(tuned, base, 0.25).tolist() == [[True, False, True, True]]
    assert not is_safe(torch.zeros(2, 2), torch.zeros(2, 2), 1.0).any()
    assert is_safe(torch.ones(2, 2), torch.zeros(2, 2), 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparsity_0_is_the_tuned_model_and_1_the_base_but_for_norms(dtype: torch.dtype, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, dtype=dtype)
    base, tuned = read_weights(pair / "base"), read_weights(pair / "tuned")
    assert all(same_bits(one, tuned[name]) for name, one in fapm(pair, tmp_path / "all", 0.0).items())
    for name, one in fapm(pair, tmp_path / "none", 1.0).items():
        assert same_bits(one, (tuned if one.dim() == 1 else base)[name]), name


def test_dare_drops_by_its_own_seed_and_scales_the_rest(pair: Path, tmp_path: Path) -> None:
    base, tuned = read_weights(pair / "base"), read_weights(pair / "tuned")
    one, again, other = (dare(pair, tmp_path / str(n), 0.9, seed) for n, seed in enumerate((3, 3, 4)))
    assert all(same_bits(one[name], again[name]) for name in one)
    assert not torch.equal(one[MATRIX], other[MATRIX])
    dropped = {name: tensor == base[name] for name, tensor in one.items()}
    for name, tensor in one.items():
        expected = base[name] + (tuned[name] - base[name]) / np.float32(1 - 0.9)
        assert torch.allclose(tensor[~dropped[name]], expected[~dropped[name]], rtol=1e-5, atol=0), name
    share = sum(int(mask.sum()) for mask in dropped.values()) / sum(mask.numel() for mask in dropped.values())
    assert share == pytest.approx(0.9, abs=0.005)
    first, second = (dropped[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)
    assert all(same_bits(tensor, tuned[name]) for name, tensor in dare(pair, tmp_path / "all", 0.0).items())


def test_dare_draws_the_same_whatever_files_and_order_the_tensors_come_in(pair: Path, tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((pair / name / "config.json").read_bytes())
        weights = dict(reversed(read_weights(pair / name).items()))
        listed = [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in weights.items()]
        writer = ShardWriter(tmp_path / name, listed, max_shard_bytes=40_000)
        for key, tensor in weights.items():
            writer.write(key, tensor)
        writer.close()
    whole, sharded = dare(pair, tmp_path / "whole", 0.5), dare(tmp_path, tmp_path / "sharded", 0.5)
    assert all(same_bits(tensor, sharded[name]) for name, tensor in whole.items())


def test_dare_is_the_generator_of_the_seed_and_the_name(tmp_path: Path) -> None:
    """Pinned: another draw under the same seed would be another model."""
    pair = hand_made(tmp_path, [1.0] * 8, tuned=[2.0] * 8)
    assert dare(pair, tmp_path / "out", 0.5, 1)[MATRIX][0, :8].tolist() == PINNED


PINNED = [1.0, 3.0, 1.0, 1.0, 1.0, 3.0, 3.0, 1.0]


def test_ties_of_one_model_is_trimming(pair: Path, tmp_path: Path) -> None:
    base, tuned = read_weights(pair / "base"), read_weights(pair / "tuned")
    for name, tensor in ties(pair, tmp_path / "out", 0.2, 0.5).items():
        change = (tuned[name] - base[name]).double()
        kept = tensor != base[name]
        assert int(kept.sum()) == round(0.2 * kept.numel())
        assert float(change[kept].abs().min()) >= float(change[~kept].abs().max())
        assert torch.allclose(tensor[kept].double(), (base[name].double() + 0.5 * change)[kept], rtol=1e-5, atol=1e-7)


def test_ties_of_three_models_by_hand(tmp_path: Path) -> None:
    """Changes of the first eight entries; of 64 x 112 that may change, all that do are kept."""
    pair = hand_made(
        tmp_path,
        [8.0] * 8,
        tuned=[8 + d for d in (1.0, 4.0, -2.0, 3.0, 0.0, 1.0, 0.0, 2.0)],
        second=[8 + d for d in (3.0, -1.0, -4.0, -3.0, 0.0, -2.0, 5.0, 2.0)],
        third=[8 + d for d in (-1.0, -2.0, 1.0, 0.0, 0.0, -1.0, 0.0, -8.0)],
    )
    # Sums: 3, 1, -5, 0, 0, -2, 5, -4. Means of what agrees: 2, 4, -3, none, none, -1.5, 5, -8.
    merged = ties(pair, tmp_path / "out", 1.0, 1.0, "second", "third")
    assert merged[MATRIX][0, :8].tolist() == [10.0, 12.0, 5.0, 8.0, 8.0, 6.5, 13.0, 0.0]
    # Each model's three largest changes: +-4, 3, 2 and 2; -4, -3, -3, 3 and 5; and so on, by 3 of its entries.
    share = 3 / merged[MATRIX].numel()
    trimmed = ties(pair, tmp_path / "trimmed", share, 1.0, "second", "third")
    # Kept: 4, -2, 3, 2 (two are equal) | 3, -4, -3, 5 (two are equal) | -2, -8, and -1, 1, -1 (three are equal).
    changes = torch.tensor(
        [
            [0.0, 4.0, -2.0, 3.0, 0.0, 0.0, 0.0, 2.0],
            [3.0, 0.0, -4.0, -3.0, 0.0, 0.0, 5.0, 0.0],
            [-1.0, -2.0, 1.0, 0.0, 0.0, -1.0, 0.0, -8.0],
        ]
    )
    sign = changes.sum(0).sign()
    agrees = (changes.sign() == sign) & (sign != 0)
    mean = torch.where(agrees, changes, 0.0).sum(0) / agrees.sum(0).clamp(min=1)
    assert trimmed[MATRIX][0, :8].tolist() == (8 + mean).tolist()
    untouched = read_weights(pair / "base")
    assert all(same_bits(tensor, untouched[name]) for name, tensor in merged.items() if name != MATRIX)


METHODS: dict[str, tuple[int, Callable[[MergeInputs], None]]] = {
    "fapm": (2, lambda inputs: keep_safe_changes(inputs, 0.9, lambda line: None)),
    "dare": (3, lambda inputs: drop_changes(inputs, 0.5, 1, lambda line: None)),
    "ties": (2, lambda inputs: merge_changes([inputs], 0.2, 1.0, lambda line: None)),
    "path": (3, lambda inputs: average_path(inputs, (0.2, 0.4), lambda line: None)),
}
"""Each with the copies of a tensor in fp32 that docs/after_training.md gives it."""


@pytest.mark.slow(reason="seven folders of 100 MB are written")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_is_bounded_by_a_few_copies_of_one_tensor(pair: Path, tmp_path: Path) -> None:
    """Folders of 24 matrices of 4 MB in bf16; a copy in fp32 is twice as large, and what is written comes on top, with
    masks of one byte for each entry."""
    sizes = {"num_layers": 8, "hidden_size": 512, "ffn_hidden_size": 4096, "num_attention_heads": 8}
    shape = ModelShape(
        **sizes, num_query_groups=1, kv_channels=16, vocab_size=64, max_position_embeddings=64, tie_embeddings=True
    )
    for number, name in enumerate(("base", "tuned")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(shape.to_hf_config()))
        listed = [(f"{unit.name}.weight", torch.bfloat16, whole_shape(unit.name, shape)) for unit in units_of(shape)]
        writer = ShardWriter(folder, listed)
        for key, dtype, size in listed:
            writer.write(key, torch.full(size, 1.0 + number, dtype=dtype))
        writer.close()
    largest = 4096 * 512 * 2
    assert (tmp_path / "base" / "model.safetensors").stat().st_size > 24 * largest
    # In a process of its own: what other tests left in this one shows in how much is taken anew.
    program = (
        f"from tests.conversion.test_kept_changes import print_peaks; print_peaks({str(pair)!r}, {str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    peaks = json.loads(done.stdout)
    assert peaks.keys() == METHODS.keys()
    for name, (copies, _) in METHODS.items():
        assert peaks[name] < (2 * copies + 1.5) * largest, f"{name}: {peaks[name] / largest:.1f} tensors"


def print_peaks(pair: str, folder: str) -> None:
    """Prints the peak memory of each method in bytes, by name, as JSON."""
    peaks = {}
    for name, (_, method) in METHODS.items():
        method(inputs_of(Path(pair), Path(folder) / f"first {name}"))  # what is imported once must not count
        with PeakMemory() as held:
            method(inputs_of(Path(folder), Path(folder) / name))
        peaks[name] = held.bytes
    print(json.dumps(peaks))
