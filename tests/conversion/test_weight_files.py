"""One clear set of weight files, or a sentence that names the candidates. Run: pytest tests/conversion"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.conversion.load import check_weights
from hft_megatron.conversion.weight_files import INDEX_FILE, SINGLE_FILE, find_weight_files
from hft_megatron.errors import UserError
from tests.support.models import build_from_folder, make_llama
from tests.support.ranks import RankPools

TWO = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
THREE = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


def write_index(folder: Path, file_of: Mapping[str, str]) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": dict(file_of)}))


def write_names(folder: Path, files: Iterable[str], indexed: Iterable[str] | None = None) -> None:
    """Empty files, and an index of one tensor in each of ``indexed``."""
    for file in files:
        (folder / file).touch()
    if indexed is not None:
        write_index(folder, {f"tensor {file}": file for file in indexed})


@pytest.mark.parametrize(
    ("files", "indexed", "read", "notes"),
    [
        ([SINGLE_FILE], None, (SINGLE_FILE,), []),
        ([SINGLE_FILE], [SINGLE_FILE], (SINGLE_FILE,), []),
        (TWO, TWO, TWO, []),
        ([SINGLE_FILE, "pytorch_model.bin", "consolidated.safetensors"], None, (SINGLE_FILE,), []),
        ([*TWO, "pytorch_model.bin", "consolidated.safetensors"], TWO, TWO, []),
        # What transformers does too, but here it is said.
        ([SINGLE_FILE], TWO, (SINGLE_FILE,), [f"not read, because its files are missing: {INDEX_FILE}"]),
        ([SINGLE_FILE, TWO[1]], None, (SINGLE_FILE,), [f"not read, because {SINGLE_FILE} holds the weights: {TWO[1]}"]),
        ([*TWO, THREE[0]], TWO, TWO, [f"not read, because {TWO[0]} to {TWO[1]} holds the weights: {THREE[0]}"]),
    ],
)
def test_the_one_set_is_found_and_what_is_passed_over_is_said(
    files: list[str], indexed: list[str] | None, read: tuple[str, ...], notes: list[str], tmp_path: Path
) -> None:
    write_names(tmp_path, files, indexed)
    found = find_weight_files(tmp_path, option="--load-hf")
    assert found.files == read
    assert list(found.notes) == [f"{tmp_path}: {note}" for note in notes]


@pytest.mark.parametrize(
    ("files", "indexed", "said"),
    [
        (
            [SINGLE_FILE, *TWO],
            TWO,
            [f"both {SINGLE_FILE} and the files that {INDEX_FILE} names ({TWO[0]} to {TWO[1]})"],
        ),
        ([SINGLE_FILE, TWO[0]], TWO, [f"both {SINGLE_FILE} and the files that {INDEX_FILE} names"]),
        ([SINGLE_FILE, *TWO], None, [f"both {SINGLE_FILE} and the set {TWO[0]} to {TWO[1]}", "remove the other"]),
        ([*TWO, *THREE], TWO, [f"both {TWO[0]} to {TWO[1]} and the set {THREE[0]} to {THREE[2]}"]),
        (TWO, TWO[:1], [f"both {TWO[0]} and the set {TWO[0]} to {TWO[1]}"]),
        ([TWO[0]], TWO, [f"{INDEX_FILE} names {TWO[1]}, and it is missing"]),
        ([THREE[1]], THREE, [f"names {THREE[0]}, {THREE[2]}, and they are missing"]),
        (TWO, None, [f"all 2 shards ({TWO[0]} to {TWO[1]}) are there, but {INDEX_FILE}", "is missing"]),
        ([TWO[1]], None, [f"{TWO[0]} and {INDEX_FILE} are missing"]),
        ([*TWO, THREE[1]], None, [f"shards of 2 sets ({TWO[0]} to {TWO[1]} and {THREE[1]})"]),
        (["pytorch_model.bin"], None, ["neither", "found: pytorch_model.bin, which is never opened"]),
        (["adapter_model.safetensors"], None, ["neither", "found: adapter_model.safetensors, which is never opened"]),
        (["config.json"], None, [f"neither {SINGLE_FILE} nor {INDEX_FILE} is there; only safetensors"]),
        ([SINGLE_FILE], [], [f"{INDEX_FILE} cannot be read"]),
    ],
)
def test_two_sets_or_half_a_set_are_one_sentence_that_names_the_files(
    files: list[str], indexed: list[str] | None, said: list[str], tmp_path: Path
) -> None:
    write_names(tmp_path, files, indexed)
    with pytest.raises(UserError) as error:
        find_weight_files(tmp_path, option="--base")
    message = str(error.value)
    assert message.startswith(f"--base {tmp_path}: ")
    assert message.endswith((".", ")."))
    assert "\n" not in message
    for part in said:
        assert part in message


def test_transformers_reads_the_single_file_also_beside_an_index_of_others(tmp_path: Path) -> None:
    """What the choice rests on: a change of it in transformers must be seen."""
    from transformers import AutoModelForCausalLM

    make_llama(tmp_path, num_hidden_layers=1)
    write_index(tmp_path, dict.fromkeys(load_file(tmp_path / SINGLE_FILE), "absent.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.model.norm.weight, load_file(tmp_path / SINGLE_FILE)["model.norm.weight"])
    (tmp_path / SINGLE_FILE).rename(tmp_path / TWO[0])
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def shard(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Makes two files and an index of the folder's one; returns what is in them."""
    weights = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    names = sorted(weights)
    parts = dict(zip(TWO, (names[: len(names) // 2], names[len(names) // 2 :]), strict=True))
    contents = {file: {name: weights[name] for name in part} for file, part in parts.items()}
    for file, part in contents.items():
        save_file(part, folder / file)
    write_index(folder, {name: file for file, part in parts.items() for name in part})
    return contents


def check(folder: Path) -> str:
    """The sentence of the check before a model is built, or nothing."""
    try:
        check_weights(str(folder), ModelShape.from_hf_config(load_hf_config(str(folder)), "config.json"))
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    make_llama(tmp_path)
    return tmp_path, shard(tmp_path)


Sharded = tuple[Path, dict[str, dict[str, torch.Tensor]]]


def test_shards_of_one_export_pass_the_check(sharded: Sharded) -> None:
    assert check(sharded[0]) == ""


def test_a_tensor_in_two_shards_is_named_with_both(sharded: Sharded) -> None:
    folder, contents = sharded
    name = min(contents[TWO[0]])
    save_file({**contents[TWO[1]], name: contents[TWO[0]][name] + 1}, folder / TWO[1])
    assert f"{name} is in {TWO[0]} and in {TWO[1]}; these files are of two exports" in check(folder)


def test_an_index_that_says_otherwise_than_the_files_is_named(sharded: Sharded) -> None:
    folder, contents = sharded
    name = min(contents[TWO[0]])
    swapped = {key: file for file, part in contents.items() for key in part} | {name: TWO[1]}
    write_index(folder, swapped)
    assert f"{INDEX_FILE} says that {name} is in {TWO[1]}, but it is in {TWO[0]}" in check(folder)
    write_index(folder, {**swapped, name: TWO[0], "model.more": TWO[0]})
    assert f"{INDEX_FILE} says that model.more is in {TWO[0]}, but it is in no file" in check(folder)


def test_a_shard_of_another_data_type_is_named_and_norms_of_another_are_not(sharded: Sharded) -> None:
    folder, contents = sharded
    norms = {
        name: tensor if "norm" in name else tensor.bfloat16()
        for part in contents.values()
        for name, tensor in part.items()
    }
    for file, part in contents.items():
        save_file({name: norms[name] for name in part}, folder / file)
    assert check(folder) == ""
    save_file(contents[TWO[1]], folder / TWO[1])
    message = check(folder)
    assert f"is BF16 in {TWO[0]}, but " in message
    assert f"is F32 in {TWO[1]}; these files are of two exports" in message


def test_a_shard_of_another_model_is_named_by_its_first_shape(sharded: Sharded) -> None:
    folder, contents = sharded
    save_file({name: torch.zeros(2, *tensor.shape) for name, tensor in contents[TWO[1]].items()}, folder / TWO[1])
    assert "has shape [2, " in check(folder)


def test_a_head_that_is_missing_or_all_there_is_comes_with_what_may_be_meant(tmp_path: Path) -> None:
    make_llama(tmp_path)
    weights = load_file(tmp_path / SINGLE_FILE)
    save_file({name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}, tmp_path / SINGLE_FILE)
    assert "lm_head.weight is missing" in check(tmp_path)
    assert "set tie_word_embeddings to true if the head is the embedding" in check(tmp_path)
    del weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / SINGLE_FILE)
    assert "if lm_head.weight, which is there, is the tied matrix, store it as model.embed_tokens" in check(tmp_path)


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("-inf"), "-inf")])
def test_a_value_that_is_not_finite_is_named_at_its_place_in_the_whole_tensor(
    value: float, shown: str, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.zeros(8, 12, dtype=dtype)
        tensor[5, 7] = value
        save_file({name: tensor}, tmp_path / SINGLE_FILE)
        with HuggingFaceWeights(str(tmp_path)) as weights:
            for part in ({}, {"dim": 0, "start": 4, "length": 2}, {"dim": 1, "start": 6, "length": 3}):
                with pytest.raises(UserError, match=rf"{name} in {SINGLE_FILE} has the value {shown} at \[5, 7\]"):
                    weights.read(name, **part)
            assert weights.read(name, dim=0, start=0, length=5).count_nonzero() == 0


def run_load(folder: str) -> str:
    try:
        build_from_folder(folder, {"tensor_model_parallel_size": 2})
    except UserError as error:
        return str(error)
    return "no error"


def test_a_value_that_one_rank_reads_ends_all_with_its_sentence(ranks: RankPools, tmp_path: Path) -> None:
    make_llama(tmp_path)
    weights = load_file(tmp_path / SINGLE_FILE)
    name = "model.layers.2.self_attn.q_proj.weight"
    weights[name][-1, 3] = float("nan")  # a row of the second rank
    save_file(weights, tmp_path / SINGLE_FILE)
    messages = ranks(2).run(run_load, folder=str(tmp_path))
    assert f"{name} in {SINGLE_FILE} has the value nan at [63, 3]" in messages[0]
    assert messages[0] == messages[1]
