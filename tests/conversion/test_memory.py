"""Converting 3 GB takes little memory beyond the model's own slice. Run: pytest -m slow tests/conversion/test_memory.py

Counted is anonymous memory (RssAnon and RssShmem), sampled while the processes run: what a conversion holds. Pages of
mapped files and of files being written are the kernel's cache, which gives way when room is needed.
"""

import contextlib
import filecmp
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.conversion.shard_writer import ShardWriter
from hft_megatron.errors import EXIT_OK
from hft_megatron.hft.units import units_of
from hft_megatron.model.parameter_names import whole_shape
from tests.support.ranks import REPOSITORY
from tests.support.runs import start_cli, write_data
from tests.support.tokenizers import make_byte_level

LIMIT = 1.5e9
"""Bytes beyond the model's own slice, for every process."""
SHAPE = ModelShape(
    num_layers=7,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=1024,
    max_position_embeddings=64,
)
"""Llama-3-8B's matrices in fewer layers. With a small vocabulary: processors without bf16 instructions take minutes for
the gradient of a large head's input."""
MODEL_BYTES = 2 * SHAPE.parameter_count()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bf16 folder of 3 GB, every tensor with other values."""
    # So large that even half of it, once more in one of two ranks, is above the limit.
    assert 2 * LIMIT < MODEL_BYTES < 3.2e9
    folder = tmp_path_factory.mktemp("model")
    announced = [(f"{unit.name}.weight", torch.bfloat16, whole_shape(unit.name, SHAPE)) for unit in units_of(SHAPE)]
    writer = ShardWriter(folder, announced)
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for number, (name, _, shape) in enumerate(announced):
        size = torch.Size(shape).numel()
        values = noise.roll(number).repeat(-(-size // noise.numel()))[:size]
        writer.write(name, values.view(shape))
    writer.close()
    (folder / "config.json").write_text(json.dumps(SHAPE.to_hf_config() | {"torch_dtype": "bfloat16"}))
    make_byte_level(folder)
    yield folder
    (folder / "model.safetensors").unlink()


def peak_of(process: "subprocess.Popen[bytes]", log: Path, *, timeout: float = 300) -> float:
    """Bytes of anonymous memory that any process of the family held at once; the command must end well."""
    peaks: dict[int, float] = {}
    deadline = time.monotonic() + timeout
    try:
        while process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            for pid in family_of(process.pid):
                peaks[pid] = max(peaks.get(pid, 0.0), anonymous_bytes(pid))
            time.sleep(0.005)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert process.returncode == EXIT_OK, log.read_text()[-3000:]
    return max(peaks.values())


def family_of(pid: int) -> Iterator[int]:
    """A process and all that it started; psutil would look through every process of the machine, 200 times a second."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # A thread or a process that has ended.
            for child in children.read_text().split():
                yield from family_of(int(child))


def anonymous_bytes(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) * 1024.0 for line in lines if line.startswith(("RssAnon", "RssShmem")))


@pytest.mark.slow(reason="3 GB are read, written and compared")
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_run_that_converts_holds_its_slice_and_little_more(tensor_parallel: int, model: Path, tmp_path: Path) -> None:
    words = ["--train-iters", "0", "--load-hf", str(model), "--save-hf", str(tmp_path / "out"), "--bf16"]
    words += ["--tensor-model-parallel-size", str(tensor_parallel)]
    log = tmp_path / "log"
    peak = peak_of(start_cli(words, ranks=tensor_parallel if tensor_parallel > 1 else None, log=log), log)
    print(f"TP {tensor_parallel}: peak {peak / 1e9:.2f} GB, slice {MODEL_BYTES / tensor_parallel / 1e9:.2f} GB")
    try:
        assert filecmp.cmp(model / "model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)
    finally:
        (tmp_path / "out" / "model.safetensors").unlink()
    assert peak > MODEL_BYTES / tensor_parallel, "the slice itself was not seen"
    assert peak - MODEL_BYTES / tensor_parallel < LIMIT


@pytest.mark.slow(reason="3 GB are read twice, and written into a checkpoint and out of it")
def test_the_tool_holds_no_slice_at_all(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.jsonl", 1)
    words = ["--load-hf", str(model), "--train-data-path", str(data), "--train-iters", "1", "--bf16"]
    words += ["--seq-length", "64", "--save", str(tmp_path / "run"), "--hft-ratio", "0", "--hft-train", "model.norm"]
    words += ["--hft-freeze-embedding", "--hft-freeze-head", "--lr-warmup-iters", "0"]
    log = tmp_path / "log"
    peak_of(start_cli(words, log=log), log)
    command = [
        sys.executable,
        "-m",
        "hft_megatron",
        "convert",
        "--load",
        tmp_path / "run",
        "--save-hf",
        tmp_path / "out",
    ]
    with log.open("wb") as output:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)
    peak = peak_of(process, log)
    print(f"tool: peak {peak / 1e9:.2f} GB")
    sizes = [path.stat().st_size for path in (model, tmp_path / "out") for path in path.glob("*.safetensors")]
    for path in (*tmp_path.rglob("*.distcp"), tmp_path / "out" / "model.safetensors"):
        path.unlink()
    assert sizes[0] == sizes[1]
    assert 1e8 < peak < LIMIT
