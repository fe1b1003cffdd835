"""What the CPU backend promises: CUDA calls mean CPU where there is no CUDA, and nothing changes where there is."""

import io
import subprocess
import sys
from typing import Any

import pytest
import torch

from hft_megatron.engine import cpu_backend


def run_promises() -> dict[str, Any]:
    """What a rank with the backend on answers to megatron-core's CUDA calls."""
    from megatron.core.tensor_parallel import random as tensor_parallel_random

    assert cpu_backend._active
    cpu_backend.activate()  # again: nothing happens
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    event.record()
    stream.wait_event(event)
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        inside = torch.ones(2, device="cuda")
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device="cuda").tolist()
    torch.cuda.set_rng_state(state)
    second = torch.rand(3, device="cuda").tolist()
    tensor_parallel_random._set_cuda_rng_state(state)
    third = torch.rand(3).tolist()
    copy = torch.zeros(2)
    made = {
        "in a stream": inside,
        "empty": torch.empty(2, device="cuda"),
        "index": torch.zeros(2, device="cuda:0"),
        "device object": torch.zeros(2, device=torch.device("cuda")),
        "current device": torch.zeros(2, device=torch.cuda.current_device()),
        "to": copy.to(device="cuda"),
        "module": torch.nn.Linear(2, 2, device="cuda").weight,
    }
    return {
        "devices": {name: tensor.device.type for name, tensor in made.items()},
        "cuda() copies": copy.cuda() is not copy,
        "types": [torch.zeros(1, dtype=dtype).type() for dtype in (torch.float32, torch.bfloat16)],
        "type(dtype)": str(torch.zeros(1).type(torch.float64).dtype),
        "draws": [first, second, third],
    }


@pytest.fixture(scope="module")
def promises(ranks) -> dict[str, Any]:
    (answer,) = ranks(1).run(run_promises)
    return answer


def test_factories_and_copies_for_cuda_give_cpu_tensors(promises):
    assert {*promises["devices"].values()} == {"cpu"}, promises["devices"]
    assert not promises["cuda() copies"]


def test_tensor_types_have_the_names_that_megatron_core_tests_for(promises):
    assert promises["types"] == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"]
    assert promises["type(dtype)"] == "torch.float64"


def test_random_states_of_cuda_are_the_cpus(promises):
    first, second, third = promises["draws"]
    assert first == second == third


def test_it_refuses_to_shadow_a_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu_backend, "_active", False)
    before = torch.cuda.current_device
    with pytest.raises(AssertionError, match="must not shadow a CUDA device"):
        cpu_backend.activate()
    assert torch.cuda.current_device is before
    assert not cpu_backend._active


@pytest.mark.slow
def test_importing_the_package_turns_nothing_on():
    code = (
        "import torch; before = torch.cuda.current_device, torch.cuda.synchronize, torch.cuda.Stream\n"
        "import hft_megatron.trainer.assembly\n"
        "from hft_megatron.engine import cpu_backend\n"
        "assert (torch.cuda.current_device, torch.cuda.synchronize, torch.cuda.Stream) == before\n"
        "assert not cpu_backend._active\n"
        "assert torch.zeros(1).type() == 'torch.FloatTensor'\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ("flags : fpu amx_bf16 amx_tile", True),
        ("flags : fpu avx512_bf16", True),
        ("flags : fpu avx512f avx512bw", False),
        ("Features : fp asimd bf16", False),
    ],
)
def test_bf16_is_fast_only_where_the_processor_says_so(monkeypatch, flags, fast):
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: io.StringIO(f"processor : 0\n{flags}\n"))
    assert cpu_backend.cpu_has_fast_bf16() is fast


def test_bf16_is_not_called_fast_where_nothing_is_known(monkeypatch):
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    assert cpu_backend.cpu_has_fast_bf16() is False
