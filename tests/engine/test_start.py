"""What is set and silenced before the engine is imported. Run: pytest tests/engine/test_start.py"""

import os
import subprocess
import sys

import pytest

from hft_megatron.engine.start import prepare_engine

ALLOCATOR, OLD_ALLOCATOR, CONNECTIONS = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ALLOCATOR, OLD_ALLOCATOR, CONNECTIONS):
        # Set and deleted, so that what the test leaves there is taken away after it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_the_allocator_can_grow_its_segments_and_kernels_keep_their_order() -> None:
    prepare_engine()
    assert os.environ[ALLOCATOR] == "expandable_segments:True"
    assert os.environ[CONNECTIONS] == "1"


def test_what_the_user_has_set_stays_under_torch_s_old_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OLD_ALLOCATOR, "max_split_size_mb:512")
    monkeypatch.setenv(CONNECTIONS, "8")
    prepare_engine()
    assert ALLOCATOR not in os.environ
    assert (os.environ[OLD_ALLOCATOR], os.environ[CONNECTIONS]) == ("max_split_size_mb:512", "8")


ALONE = """
import sys
from hft_megatron.engine.start import prepare_engine
prepare_engine()
import torch
import hft_megatron.trainer.assembly
absent = {"torch._dynamo", "torch._inductor.compile_fx", "wandb"}
assert not absent & set(sys.modules), absent & set(sys.modules)
import wandb
from megatron.core.jit import jit_fuser
@jit_fuser
def doubled(x):
    return 2 * x
assert doubled.__name__ == "doubled"
assert "torch._inductor.compile_fx" not in sys.modules
torch.compiler.set_stance("force_eager")
assert doubled(x=torch.ones(1)).item() == 2
assert "torch._inductor.compile_fx" in sys.modules
assert torch.compile.__module__ == "torch"
"""


@pytest.mark.slow
@pytest.mark.engine
def test_the_engine_comes_without_torch_s_compiler_which_then_works_when_it_is_called() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
