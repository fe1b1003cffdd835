"""How the process groups of a run start, as far as a machine without CUDA shows it. Run: pytest tests/parallel"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.errors import UserError
from hft_megatron.parallel import groups
from hft_megatron.parallel.groups import start_backend


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two CUDA devices by torch's word; what the default group was started with."""
    started: dict[str, Any] = {}
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "set_device": lambda device: None,
        "current_device": lambda: 1,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(groups.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(
        groups.dist, "init_process_group", lambda backend, **rest: started.update(rest, backend=backend)
    )
    return started


MEETING: Any = SimpleNamespace(store=None, rank=0, world_size=1)


def test_gloo_is_refused_where_tensors_are_on_cuda(with_cuda: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"--distributed-backend gloo lacks collectives for CUDA tensors, .* use nccl or"
    ):
        start_backend(ParallelConfig(distributed_backend="gloo"), MEETING)
    assert not with_cuda


def test_nccl_knows_the_device_of_this_rank_but_under_the_interleaved_schedule(with_cuda: dict[str, Any]) -> None:
    start_backend(ParallelConfig(), MEETING)
    assert (with_cuda["backend"], with_cuda["device_id"]) == ("nccl", torch.device("cuda", 1))
    start_backend(ParallelConfig(num_layers_per_virtual_pipeline_stage=1), MEETING)
    assert with_cuda["device_id"] is None


def test_more_ranks_than_devices_are_refused(with_cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="starts local rank 2, but this host has 2 CUDA devices; start at most 2 ranks"):
        start_backend(ParallelConfig(), MEETING)


def test_nccl_is_refused_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--distributed-backend nccl needs a CUDA device"):
        start_backend(ParallelConfig(distributed_backend="nccl"), MEETING)


def test_deterministic_mode_fills_no_empty_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in groups._ENVIRONMENT:
        monkeypatch.setenv(name, "")
    try:
        groups.make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
