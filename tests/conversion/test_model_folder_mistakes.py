"""A model folder that cannot be read is one sentence that names it. Run: pytest tests/conversion"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.conversion.load import check_weights
from hft_megatron.errors import UserError
from tests.support.models import build_from_folder, make_llama
from tests.support.ranks import RankPools

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def remove_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / WEIGHTS)


def reshape_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(16, 64)
    save_file(weights, folder / WEIGHTS)


def quantize_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].to(torch.int8)
    save_file(weights, folder / WEIGHTS)


def cut_the_file(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])


def empty_the_file(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def keep_only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def name_a_missing_shard(folder: Path) -> None:
    places = dict.fromkeys(load_file(folder / WEIGHTS), "model-00001-of-00002.safetensors")
    places["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def break_the_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": ')


def leave_out_the_weight_map(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def make_the_index_a_list(folder: Path) -> None:
    (folder / INDEX).write_text("[]")


def add(folder: Path, name: str, tensor: torch.Tensor) -> None:
    save_file({**load_file(folder / WEIGHTS), name: tensor}, folder / WEIGHTS)


def add_a_bias(folder: Path) -> None:
    add(folder, "model.layers.0.self_attn.q_proj.bias", torch.zeros(64))


def add_a_norm_of_queries(folder: Path) -> None:
    add(folder, "model.layers.0.self_attn.q_norm.weight", torch.ones(16))


def add_quantized_parts(folder: Path) -> None:
    add(folder, "model.layers.3.mlp.down_proj.qweight", torch.zeros(4, 4, dtype=torch.int32))


def tie_to_another_head(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


MISTAKES_OF_THE_CHECK: list[tuple[Callable[[Path], None], list[str]]] = [
    (add_a_bias, ["model.layers.0.self_attn.q_proj.bias", "has no biases"]),
    (add_a_norm_of_queries, ["model.layers.0.self_attn.q_norm.weight", "describes no such tensor"]),
    (add_quantized_parts, ["model.layers.3.mlp.down_proj.qweight", "dequantize"]),
    (tie_to_another_head, ["tie_word_embeddings", "lm_head.weight and model.embed_tokens.weight differ"]),
]
"""Nothing that the loader reads is wrong here, so only the check before a model is built finds them."""

MISTAKES: list[tuple[Callable[[Path], None], list[str]]] = [
    (remove_a_tensor, ["model.layers.2.mlp.up_proj.weight is missing"]),
    (reshape_a_tensor, ["model.layers.1.self_attn.k_proj.weight has shape [16, 64]", "config.json asks for [32, 64]"]),
    (quantize_a_tensor, ["model.layers.0.self_attn.q_proj.weight is stored as I8", "dequantize"]),
    (cut_the_file, [f"{WEIGHTS} cannot be read"]),
    (empty_the_file, [f"{WEIGHTS} cannot be read"]),
    (
        keep_only_a_pickle,
        [f"neither {WEIGHTS} nor {INDEX} is there", "found: pytorch_model.bin", "only safetensors under these names"],
    ),
    (name_a_missing_shard, ["names model-00002-of-00002.safetensors, and it is missing"]),
    (break_the_index, [f"{INDEX} cannot be read"]),
    (leave_out_the_weight_map, [f"{INDEX} cannot be read"]),
    (make_the_index_a_list, [f"{INDEX} cannot be read"]),
]


def run_load(folder: str) -> str:
    try:
        build_from_folder(folder, {})
    except UserError as error:
        return str(error)
    return "no error"


def message_of_check(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        check_weights(str(folder), ModelShape.from_hf_config(load_hf_config(str(folder)), "config.json"))
    return str(error.value)


def assert_one_sentence(message: str, folder: Path, said: list[str]) -> None:
    assert f"--load-hf {folder}" in message
    assert "\n" not in message
    assert message.endswith(".")
    for part in said:
        assert part in message


def copy_of(folder: Path, target: Path) -> Path:
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.fixture(scope="session")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("good") / "model")


@pytest.mark.parametrize(("break_it", "said"), MISTAKES, ids=[mistake.__name__ for mistake, _ in MISTAKES])
def test_a_broken_folder_is_one_sentence(
    break_it: Callable[[Path], None], said: list[str], ranks: RankPools, good_folder: Path, tmp_path: Path
) -> None:
    break_it(copy_of(good_folder, tmp_path))
    [message] = ranks(1).run(run_load, folder=str(tmp_path))
    assert message_of_check(tmp_path) == message, "found before a model is built, and by the loader itself"
    assert_one_sentence(message, tmp_path, said)


@pytest.mark.parametrize(
    ("break_it", "said"), MISTAKES_OF_THE_CHECK, ids=[mistake.__name__ for mistake, _ in MISTAKES_OF_THE_CHECK]
)
def test_a_tensor_that_nothing_would_read_is_one_sentence(
    break_it: Callable[[Path], None], said: list[str], good_folder: Path, tmp_path: Path
) -> None:
    break_it(copy_of(good_folder, tmp_path))
    assert_one_sentence(message_of_check(tmp_path), tmp_path, said)


def test_a_tied_head_that_is_there_twice_passes_the_check(tmp_path: Path) -> None:
    make_llama(tmp_path, "tied")
    add(tmp_path, "lm_head.weight", load_file(tmp_path / WEIGHTS)["model.embed_tokens.weight"].clone())
    check_weights(str(tmp_path), ModelShape.from_hf_config(load_hf_config(str(tmp_path)), "config.json"))


@pytest.mark.parametrize("variant", ["gqa", "tied", "mistral"])
def test_a_good_folder_passes_the_check(variant: str, tmp_path: Path) -> None:
    make_llama(tmp_path, variant)
    check_weights(str(tmp_path), ModelShape.from_hf_config(load_hf_config(str(tmp_path)), "config.json"))


def test_each_rank_reads_its_slice_only(good_folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    whole = load_file(good_folder / WEIGHTS)[name]
    with HuggingFaceWeights(str(good_folder)) as weights:
        assert torch.equal(weights.read(name), whole)
        assert torch.equal(weights.read(name, dim=0, start=8, length=4), whole[8:12])
        assert torch.equal(weights.read(name, dim=1, start=56, length=56), whole[:, 56:])
