"""What a host gives its ranks. Run: pytest tests/doctor/test_machine.py"""

import resource
from types import SimpleNamespace

import pytest
import torch

from hft_megatron.doctor import machine
from hft_megatron.doctor.machine import (
    device_finding,
    host_findings,
    locked_memory_finding,
    settings_findings,
    shared_memory_finding,
)

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(("free", "status"), [(64 * MIB, "warning"), (GIB - 1, "warning"), (GIB, "ok")])
def test_less_than_a_gibibyte_of_free_shared_memory_is_a_warning(free: int, status: str) -> None:
    finding = shared_memory_finding(8 * GIB, free)
    assert finding.status == status
    assert finding.fix is None or "--shm-size" in finding.fix


def test_ranks_without_a_device_share_the_hosts_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    assert machine.device_memory(local_ranks=4) == 2 * GIB


def test_a_rank_with_a_device_has_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine.torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        machine.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=(device + 79) * GIB)
    )
    assert machine.device_memory(local_ranks=4) == 80 * GIB


def test_dockers_default_is_shown_with_its_size() -> None:
    assert shared_memory_finding(64 * MIB, 64 * MIB).value == "67.1 MB, 67.1 MB free in /dev/shm"


def test_locked_memory_must_be_unlimited() -> None:
    assert locked_memory_finding(resource.RLIM_INFINITY).status == "ok"
    limited = locked_memory_finding(8 * MIB)
    assert (limited.status, limited.value) == ("warning", "at most 8.4 MB")


def test_settings_are_named_without_their_values_and_others_not_at_all() -> None:
    environment = {"NCCL_DEBUG": "s3cret", "OMP_NUM_THREADS": "s3cret", "WANDB_API_KEY": "s3cret", "HF_TOKEN": "s3cret"}
    [finding] = settings_findings(environment)
    assert finding.value == "NCCL_DEBUG, OMP_NUM_THREADS set, in the environment or by this program"
    assert list(settings_findings({"HOME": "/root"})) == []


def test_this_machine_has_cores_and_memory() -> None:
    found = {finding.what: finding for finding in host_findings()}
    assert {"processor", "memory"} <= found.keys()
    assert not any(finding.status == "wrong" for finding in found.values())


def test_a_device_that_computes_is_ok() -> None:
    assert device_finding(torch.device("cpu"), "gloo").value == "CPU, gloo"


def test_a_device_that_cannot_compute_is_wrong_with_torchs_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(torch, "ones", no_kernel)
    finding = device_finding(torch.device("cpu"), "gloo")
    assert finding.status == "wrong"
    assert "(CUDA error: no kernel image is available for execution on the device)" in str(finding.fix)


def test_a_device_that_computes_something_else_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "ones", torch.zeros)
    finding = device_finding(torch.device("cpu"), "gloo")
    assert finding.status == "wrong"
    assert "of ones is wrong" in str(finding.fix)
