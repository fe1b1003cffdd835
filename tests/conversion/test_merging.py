"""Merged weights are the base's, the tuned model's or their average, to the bit. Run: pytest tests/conversion"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.conversion import merging
from hft_megatron.conversion.merge_inputs import MergeFolders, MergeInputs, check_folders
from hft_megatron.conversion.merging import average_path, average_weights, half_reset
from hft_megatron.conversion.shard_writer import ShardWriter
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan, make_plan
from hft_megatron.hft.plan_file import load_plans
from hft_megatron.hft.units import units_of
from hft_megatron.model.parameter_names import whole_shape
from tests.support.pairs import make_pair, read_weights, same_bits
from tests.support.peak_memory import PeakMemory


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with ``base`` and ``tuned`` by the name of a variant, made once."""
    made: dict[str, Path] = {}

    def pair(variant: str) -> Path:
        if variant not in made:
            made[variant] = make_pair(tmp_path_factory.mktemp(variant), variant)
        return made[variant]

    return pair


def inputs_of(pair: Path, output: Path) -> MergeInputs:
    return check_folders(MergeFolders(tuned=str(pair / "tuned"), base=str(pair / "base"), output=str(output)))


def reset(pair: Path, output: Path, hft: HFTConfig | None = None) -> tuple[Plan, list[str]]:
    """Half-Reset into ``output``: the plan, and what was said."""
    inputs = inputs_of(pair, output)
    plan = make_plan(inputs.shape, hft or HFTConfig(), default_seed=1)
    said: list[str] = []
    half_reset(inputs, plan, said.append)
    return plan, said


def average(pair: Path, output: Path, coefficient: float) -> list[str]:
    said: list[str] = []
    average_weights(inputs_of(pair, output), coefficient, said.append)
    return said


@pytest.mark.parametrize("variant", ["gqa", "tied"])
@pytest.mark.parametrize("level", ["category", "layer", "model"])
def test_trainable_units_are_the_tuned_models_and_frozen_ones_the_bases(
    variant: str, level: str, pairs: Callable[[str], Path], tmp_path: Path
) -> None:
    pair = pairs(variant)
    plan, _ = reset(pair, tmp_path / "out", replace(HFTConfig(), hft_level=level))
    base, tuned, merged = (read_weights(folder) for folder in (pair / "base", pair / "tuned", tmp_path / "out"))
    assert merged.keys() == tuned.keys() == {f"{unit.name}.weight" for unit in plan.units}
    for unit in plan.units:
        name = f"{unit.name}.weight"
        assert same_bits(merged[name], tuned[name]) == plan.trains(unit.name), name
        assert same_bits(merged[name], base[name]) != plan.trains(unit.name), name


def test_half_of_every_category_of_a_layer_is_reset_and_nothing_outside_the_layers(
    pairs: Callable[[str], Path], tmp_path: Path
) -> None:
    """2 of 4 attention matrices, 1 or 2 of 3 feed-forward ones (1.5 on average), 1 of 2 norms (arXiv 2404.18466)."""
    reset(pairs("gqa"), tmp_path / "out")
    base, merged = read_weights(pairs("gqa") / "base"), read_weights(tmp_path / "out")
    back = [name for name, tensor in merged.items() if torch.equal(tensor, base[name])]
    feed_forward = []
    for layer in range(4):
        inside = [name for name in back if name.startswith(f"model.layers.{layer}.")]
        assert len([name for name in inside if ".self_attn." in name]) == 2
        assert len([name for name in inside if "layernorm" in name]) == 1
        feed_forward.append(len([name for name in inside if ".mlp." in name]))
    assert sorted(feed_forward) == [1, 1, 2, 2]
    assert all(name.startswith("model.layers.") for name in back)


def test_ratio_1_is_the_tuned_model_and_ratio_0_keeps_only_what_is_outside_the_layers(
    pairs: Callable[[str], Path], tmp_path: Path
) -> None:
    pair = pairs("gqa")
    reset(pair, tmp_path / "all", replace(HFTConfig(), hft_ratio=1.0))
    reset(pair, tmp_path / "none", replace(HFTConfig(), hft_ratio=0.0))
    base, tuned = read_weights(pair / "base"), read_weights(pair / "tuned")
    assert all(same_bits(tensor, tuned[name]) for name, tensor in read_weights(tmp_path / "all").items())
    for name, tensor in read_weights(tmp_path / "none").items():
        assert same_bits(tensor, (base if ".layers." in name else tuned)[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_average_is_numpys_computed_in_fp32_and_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, dtype=dtype)
    average(pair, tmp_path / "out", 0.3)
    base, tuned, merged = (read_weights(folder) for folder in (pair / "base", pair / "tuned", tmp_path / "out"))
    assert merged.keys() == tuned.keys()
    for name, tensor in merged.items():
        start, end = base[name].float().numpy(), tuned[name].float().numpy()
        expected = start + np.float32(0.3) * (end - start)
        assert expected.dtype == np.float32
        assert same_bits(tensor, torch.from_numpy(expected).to(dtype)), name


def test_coefficients_0_and_1_give_the_bits_of_one_model_and_shared_weights_keep_their_value(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    norm = "model.norm.weight"
    base, tuned = read_weights(pair / "base"), read_weights(pair / "tuned")
    base[norm][:2] = torch.tensor([-0.0, 0.1])
    tuned[norm][:2] = torch.tensor([1.0, 0.1])
    for folder, weights in ((pair / "base", base), (pair / "tuned", tuned)):
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for coefficient, expected in ((0, base), (1, tuned)):
        average(pair, tmp_path / str(coefficient), coefficient)
        merged = read_weights(tmp_path / str(coefficient))
        assert all(same_bits(tensor, expected[name]) for name, tensor in merged.items())
    for coefficient in (0.1, 0.3, 0.7, 0.9):
        average(pair, tmp_path / str(coefficient), coefficient)
        assert read_weights(tmp_path / str(coefficient))[norm][1] == base[norm][1]


def test_a_path_is_every_average_of_its_own_from_one_reading(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, dtype=torch.bfloat16)
    said: list[str] = []
    reads: list[str] = []
    original = merging.HuggingFaceWeights.read

    def read(self: Any, name: str, **options: Any) -> torch.Tensor:
        reads.append(f"{self.option} {name}")
        return original(self, name, **options)

    coefficients = (0.75, 0.0, 0.1, 1.0, 0.3)
    with patch.object(merging.HuggingFaceWeights, "read", read):
        average_path(inputs_of(pair, tmp_path / "path"), coefficients, said.append)
    # By the check of both folders, for all averages, and for the end of the path that is this model's own bits.
    assert len(reads) == 3 * len(set(reads))
    assert sorted(path.name for path in (tmp_path / "path").iterdir()) == ["0", "0.1", "0.3", "0.75", "1"]
    assert said[-1] == (
        f"average: {tmp_path / 'path'} has base + c x (tuned - base) for c in 0.75, 0, 0.1, 1, 0.3, a folder for each"
    )
    for coefficient in coefficients:
        average(pair, tmp_path / f"alone {coefficient:g}", coefficient)
        one, alone = tmp_path / "path" / f"{coefficient:g}", tmp_path / f"alone {coefficient:g}"
        assert {file.name for file in one.iterdir()} == {file.name for file in alone.iterdir()}
        assert all((one / file.name).read_bytes() == file.read_bytes() for file in alone.iterdir())


def test_the_sources_are_only_read(pairs: Callable[[str], Path], tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in pairs("gqa").rglob("*") if file.is_file()}
    reset(pairs("gqa"), tmp_path / "reset")
    average(pairs("gqa"), tmp_path / "average", 0.5)
    assert {file: file.read_bytes() for file in pairs("gqa").rglob("*") if file.is_file()} == before


def test_headers_and_a_file_say_what_was_merged(pairs: Callable[[str], Path], tmp_path: Path) -> None:
    plan, said = reset(pairs("gqa"), tmp_path / "reset")
    with safe_open(tmp_path / "reset" / "model.safetensors", framework="pt") as weights:
        header = weights.metadata()
    assert header["format"] == "pt"
    assert header["hft_merge"] == "half-reset"
    assert header["hft_plan"] == plan.digest
    assert header["hft_policy"] == "ratio 0.5, selection random by category, seed 1"
    shape = inputs_of(pairs("gqa"), tmp_path / "other").shape
    [loaded] = load_plans(str(tmp_path / "reset" / "half_reset.json"), shape)
    assert loaded == plan
    assert plan.short_digest in "".join(said)

    said = average(pairs("gqa"), tmp_path / "average", 0.25)
    with safe_open(tmp_path / "average" / "model.safetensors", framework="pt") as weights:
        averaged = weights.metadata()
    record = json.loads((tmp_path / "average" / "average.json").read_text())
    assert record["coefficient"] == float(averaged["hft_coefficient"]) == 0.25
    for name in ("tuned", "base"):
        assert record[name]["digest"] == averaged[f"hft_{name}"] == header[f"hft_{name}"]
        assert record[name]["folder"] == str(pairs("gqa") / name)
    assert header["hft_tuned"] != header["hft_base"]
    assert "0.25" in said[-1]


def test_another_data_type_of_the_base_is_said_and_rounded_to_the_tuned_models(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, dtype=torch.bfloat16)
    base = {name: tensor.float() * 1.001 for name, tensor in read_weights(pair / "base").items()}
    save_file(base, pair / "base" / "model.safetensors", metadata={"format": "pt"})
    plan, said = reset(pair, tmp_path / "reset")
    assert said[0] == (
        f"{len(base)} of {len(base)} tensors have another data type in --base (model.embed_tokens.weight: "
        "torch.float32) than in --tuned (torch.bfloat16); the output uses that of --tuned, and values are rounded to it"
    )
    merged = read_weights(tmp_path / "reset")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    for unit in plan.units:
        if not plan.trains(unit.name):
            name = f"{unit.name}.weight"
            assert same_bits(merged[name], base[name].to(torch.bfloat16)), name
    average(pair, tmp_path / "average", 0.5)
    name = "model.layers.1.mlp.up_proj.weight"
    tuned = read_weights(pair / "tuned")[name].float()
    expected = (base[name] + 0.5 * (tuned - base[name])).to(torch.bfloat16)
    assert same_bits(read_weights(tmp_path / "average")[name], expected)


def test_a_value_too_large_for_the_tuned_models_data_type_is_refused(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, dtype=torch.float16)
    base = {name: tensor.to(torch.bfloat16) for name, tensor in read_weights(pair / "base").items()}
    base["model.layers.2.mlp.down_proj.weight"][3, 4] = 1e6
    save_file(base, pair / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^model.layers.2.mlp.down_proj.weight .* torch.float16, its data type in"):
        reset(pair, tmp_path / "out", replace(HFTConfig(), hft_ratio=0.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_sharded_folders_give_what_single_files_give(pairs: Callable[[str], Path], tmp_path: Path) -> None:
    pair = pairs("gqa")
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((pair / name / "config.json").read_bytes())
        weights = read_weights(pair / name)
        listed = [(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in weights.items()]
        writer = ShardWriter(tmp_path / name, listed, max_shard_bytes=30_000 if name == "base" else 50_000)
        for key, tensor in weights.items():
            writer.write(key, tensor)
        writer.close()
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 3
    for source, output in ((pair, tmp_path / "of_single"), (tmp_path, tmp_path / "of_sharded")):
        reset(source, output / "reset")
        average(source, output / "average", 0.4)
    for kind in ("reset", "average"):
        single, sharded = (
            (tmp_path / source / kind / "model.safetensors").read_bytes() for source in ("of_single", "of_sharded")
        )
        assert single == sharded


def test_what_a_folder_holds_twice_or_for_nothing_is_no_part_of_the_output(tmp_path: Path) -> None:
    """Old exports have a copy of the tied embedding, and the rotary frequencies."""
    pair = make_pair(tmp_path, "tied")
    weights = read_weights(pair / "tuned")
    more = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights | more, pair / "tuned" / "model.safetensors", metadata={"format": "pt"})
    average(pair, tmp_path / "out", 1.0)
    merged = read_weights(tmp_path / "out")
    assert merged.keys() == weights.keys()
    assert all(same_bits(tensor, weights[name]) for name, tensor in merged.items())


def test_what_fails_half_way_leaves_no_folder(pairs: Callable[[str], Path], tmp_path: Path) -> None:
    with (
        patch.object(merging.shutil, "copyfile", side_effect=OSError("disk full")),
        pytest.raises(OSError, match="disk full"),
    ):
        reset(pairs("gqa"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with (
        patch.object(merging.ShardWriter, "close", side_effect=OSError("disk full")),
        pytest.raises(OSError, match="disk full"),
    ):
        average_path(inputs_of(pairs("gqa"), tmp_path / "out"), (0.2, 0.4), lambda line: None)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()  # an empty folder may be there
    reset(pairs("gqa"), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_is_bounded_by_one_tensor_of_each_model(pairs: Callable[[str], Path], tmp_path: Path) -> None:
    """Folders of 12 matrices of 8 MB in bf16. A pair is four times that in fp32, and the result once."""
    sizes = {"num_layers": 4, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 8}
    shape = ModelShape(
        **sizes, num_query_groups=1, kv_channels=16, vocab_size=64, max_position_embeddings=64, tie_embeddings=True
    )
    for name in ("base", "tuned"):
        folder_bytes = write_model(tmp_path / name, shape)
    largest = 4096 * 1024 * 2
    assert folder_bytes > 12 * largest
    reset(pairs("gqa"), tmp_path / "first")  # what is imported and allocated once must not count
    average(pairs("gqa"), tmp_path / "second", 0.5)
    with PeakMemory() as of_a_tensor:
        held = torch.ones(folder_bytes, dtype=torch.uint8)
    del held
    assert of_a_tensor.bytes > 0.9 * folder_bytes, "the watch sees what is held"
    with PeakMemory() as of_reset:
        reset(tmp_path, tmp_path / "reset")
    with PeakMemory() as of_average:
        average(tmp_path, tmp_path / "average", 0.5)
    assert of_reset.bytes < 2 * largest
    # Twice the pair, because malloc may keep the one before.
    assert of_average.bytes < (2 * 4 + 1) * largest < folder_bytes


def write_model(folder: Path, shape: ModelShape) -> int:
    """A bf16 model of ones without a tensor more than one in memory; the bytes of its weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.to_hf_config()))
    names = [(f"{unit.name}.weight", torch.bfloat16, whole_shape(unit.name, shape)) for unit in units_of(shape)]
    writer = ShardWriter(folder, names)
    for name, dtype, size in names:
        writer.write(name, torch.ones(size, dtype=dtype))
    writer.close()
    return (folder / "model.safetensors").stat().st_size
