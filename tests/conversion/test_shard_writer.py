"""Files written tensor by tensor are what the safetensors library reads. Run: pytest tests/conversion"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hft_megatron.conversion.shard_writer import DTYPE_NAMES, ShardWriter

METADATA = {"plan": '{"seed": 1}', "note": "häl\nf"}


def write(folder: Path, tensors: dict[str, Tensor], **options: int) -> list[Path]:
    """The files that a ShardWriter makes of ``tensors``."""
    announced = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = ShardWriter(folder, announced, metadata=METADATA, **options)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    return sorted(folder.glob("*.safetensors"))


def assert_read_back(files: list[Path], expected: dict[str, Tensor]) -> None:
    """By the library, tensor by tensor (memory-mapped, so that a wrong alignment would show), and whole."""
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as opened:
            assert opened.metadata() == {**METADATA, "format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dictionary)
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, found[name])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_every_data_type_and_odd_size_is_read_back_by_the_library(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {}
    for number, dtype in enumerate(sorted(DTYPE_NAMES, key=lambda dtype: dtype.itemsize)):
        for shape in ((3, 5), (7,), (), (0,), (4, 0)):
            value = torch.randn(shape) * 100
            tensors[f"weight.{number}.{'x'.join(map(str, shape))}"] = value.to(dtype)
    tensors["a name of ümlauts"] = torch.randn(3, 3)
    [path] = write(tmp_path, tensors)
    assert path.name == "model.safetensors"
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert_read_back([path], tensors)


def test_a_view_is_written_as_its_values(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"rows": whole[1:3], "columns": whole[:, 2:4], "transposed": whole.t()}
    assert_read_back(write(tmp_path, tensors), tensors)


@pytest.mark.parametrize(
    ("limit", "per_file"),
    [
        (10**6, [5]),
        (80, [2, 2, 1]),  # exactly two tensors of 40 bytes
        (79, [1, 1, 1, 1, 1]),
        (1, [1, 1, 1, 1, 1]),  # a tensor larger than a file
        (200, [5]),  # exactly all: no empty file follows
        (199, [4, 1]),
    ],
)
def test_files_hold_consecutive_tensors_up_to_the_limit(limit: int, per_file: list[int], tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.weight": torch.full((10,), float(i)) for i in range(5)}
    files = write(tmp_path, tensors, max_shard_bytes=limit)
    assert_read_back(files, tensors)
    held = []
    for path in files:
        with safe_open(path, framework="pt") as opened:
            held.append(len(opened.keys()))
    assert held == per_file
    index_file = tmp_path / "model.safetensors.index.json"
    assert index_file.exists() == (len(files) > 1)
    if len(files) > 1:
        total = len(files)
        assert [path.name for path in files] == [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
        index = json.loads(index_file.read_text())
        assert index["metadata"]["total_size"] == 200
        for name, file in index["weight_map"].items():
            assert name in load_file(tmp_path / file)


def test_no_tensors_are_one_readable_file(tmp_path: Path) -> None:
    [path] = write(tmp_path, {})
    assert_read_back([path], {})


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, [("a", torch.float32, (2,)), ("b", torch.bfloat16, (2,))])
    for name, tensor in (
        ("b", torch.zeros(2, dtype=torch.bfloat16)),
        ("a", torch.zeros(3)),
        ("a", torch.zeros(2).half()),
    ):
        with pytest.raises(AssertionError):
            writer.write(name, tensor)
    writer.write("a", torch.zeros(2))
    with pytest.raises(AssertionError, match="b was not written"):
        writer.close()
    with pytest.raises(AssertionError, match="twice"):
        ShardWriter(tmp_path, [("a", torch.float32, (2,)), ("a", torch.float32, (2,))])
