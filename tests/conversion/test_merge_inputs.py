"""Folders that cannot be merged are one sentence each, and differences that don't matter a note.

Run: pytest tests/conversion/test_merge_inputs.py
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hft_megatron.conversion.merge_inputs import MergeFolders, check_folders
from hft_megatron.conversion.merging import average_weights
from hft_megatron.errors import UserError
from tests.support.models import LLAMA3_ROPE
from tests.support.pairs import change_config, make_pair

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
def good_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("good_pair"))


@pytest.fixture
def pair(good_pair: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        for file in (good_pair / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    return tmp_path


def folders(pair: Path, **options: str) -> MergeFolders:
    given = {"tuned": str(pair / "tuned"), "base": str(pair / "base"), "output": str(pair / "out")}
    return MergeFolders(**given | options)


def message_of(folders: MergeFolders) -> str:
    """The sentence of a merge that is refused."""
    with pytest.raises(UserError) as error:
        average_weights(check_folders(folders), 0.5, lambda line: None)
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("missing", ["tuned", "base", "output"])
def test_every_folder_must_be_given(missing: str, pair: Path) -> None:
    options = {name: None if name == missing else str(pair / name) for name in ("tuned", "base", "output")}
    assert message_of(MergeFolders(**options)).startswith(f"--{missing} is missing")


def test_one_folder_given_twice_is_refused_however_it_is_spelled(pair: Path) -> None:
    (pair / "link").symlink_to(pair / "tuned")
    for base in (pair / "tuned", pair / "base" / ".." / "tuned", pair / "link"):
        assert message_of(folders(pair, base=str(base))).startswith(f"--base {base} is the folder of --tuned")


@pytest.mark.parametrize(
    ("key", "value", "was"),
    [
        ("num_hidden_layers", 5, "4"),
        ("vocab_size", 97, "96"),
        ("num_key_value_heads", 4, "2"),
        ("tie_word_embeddings", True, "False"),
        ("head_dim", 32, "16"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500.0}, "10000.0"),
        ("rope_parameters", {**LLAMA3_ROPE, "rope_theta": 10000.0}, "None"),
    ],
)
def test_models_of_different_shapes_are_refused_by_the_first_key_and_both_values(
    key: str, value: object, was: str, pair: Path
) -> None:
    change_config(pair / "base", **{key: value})
    message = message_of(folders(pair))
    assert message.startswith(f"--base {pair / 'base' / 'config.json'} has ")
    shown = {"rope_parameters": "rope_theta" if was == "10000.0" else "rope_scaling"}.get(key, key)
    assert f" has {shown} " in message
    assert f"--tuned {pair / 'tuned' / 'config.json'} has {was};" in message
    assert not (pair / "out").exists()


def test_keys_that_leave_weights_their_meaning_may_differ_and_are_noted(pair: Path) -> None:
    change_config(pair / "base", rms_norm_eps=1e-5, max_position_embeddings=64, initializer_range=0.5)
    assert check_folders(folders(pair)).notes == (
        "config.json has max_position_embeddings 128 in --tuned, which is kept, and 64 in --base",
        "config.json has rms_norm_eps 1e-06 in --tuned, which is kept, and 1e-05 in --base",
        "config.json has initializer_range 0.1 in --tuned, which is kept, and 0.5 in --base",
    )
    said: list[str] = []
    inputs = check_folders(folders(pair))
    average_weights(inputs, 0.5, said.append)
    assert said[:3] == list(inputs.notes)
    assert json.loads((pair / "out" / "config.json").read_text())["max_position_embeddings"] == 128


def remove_the_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def remove_the_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_the_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def make_it_another_architecture(folder: Path) -> None:
    change_config(folder, model_type="gpt2")


def remove_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / WEIGHTS)


def add_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, folder / WEIGHTS)


def reshape_a_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"model.layers.1.self_attn.k_proj.weight": torch.zeros(16, 64)}, folder / WEIGHTS)


def cut_the_file(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (remove_the_folder, "there is no such folder"),
    (remove_the_config, "there is no config.json"),
    (remove_the_weights, "neither model.safetensors nor model.safetensors.index.json is there"),
    (make_it_another_architecture, 'model_type is "gpt2"'),
    (remove_a_tensor, "the tensor model.layers.2.mlp.up_proj.weight is missing"),
    (add_a_tensor, "model.layers.0.self_attn.q_proj.bias"),
    (reshape_a_tensor, "model.layers.1.self_attn.k_proj.weight has shape [16, 64], but config.json asks for [32, 64]"),
    (cut_the_file, "model.safetensors cannot be read"),
]


@pytest.mark.parametrize("option", ["tuned", "base"])
@pytest.mark.parametrize(("break_it", "said"), BROKEN, ids=[mistake.__name__ for mistake, _ in BROKEN])
def test_a_broken_folder_is_named_by_its_option(
    break_it: Callable[[Path], None], said: str, option: str, pair: Path
) -> None:
    break_it(pair / option)
    message = message_of(folders(pair))
    assert message.startswith(f"--{option} {pair / option}")
    assert said in message
    assert "--load-hf" not in message
    assert not (pair / "out").exists()
    assert not (pair / ".out.unfinished").exists()


def test_an_output_that_holds_something_is_kept(pair: Path) -> None:
    (pair / "out").mkdir()
    (pair / "out" / "notes.txt").write_text("mine")
    assert message_of(folders(pair)).startswith(f"--output {pair / 'out'} is not empty")
    assert message_of(folders(pair, output=str(pair / "tuned"))).startswith(f"--output {pair / 'tuned'} is not empty")
    file = pair / "out" / "notes.txt"
    assert message_of(folders(pair, output=str(file))).startswith(f"--output {file} is a file")
    below = file / "deeper"
    assert message_of(folders(pair, output=str(below))).startswith(f"--output {below} cannot be written")
    assert file.read_text() == "mine"
