"""Checks of the machine: devices, memory and disks, and the software on it."""

import os
import platform
import resource
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from packaging.requirements import InvalidRequirement, Requirement

import hft_megatron
from hft_megatron.costs.rank_memory import in_bytes
from hft_megatron.doctor.findings import Finding
from hft_megatron.engine import cpu_backend

SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_BYTES = 1 << 30
"""Minimum by NVIDIA's containers and NCCL's manual (Troubleshooting, "Shared memory"); Docker gives 64 MB."""
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
SETTINGS = ("NCCL_", "TORCH_NCCL_", "GLOO_", "NVTE_", "CUDA_", "OMP_NUM_THREADS", "PYTORCH_")
"""Prefixes of the environment variables that change how ranks compute and communicate."""
_FREE_SHARE = 0.9
"""Share of free memory below which another process uses the GPU: CUDA itself takes less than 1 GB."""
_SIDE = 256
_UNLIMITED = resource.RLIM_INFINITY


def host_findings() -> Iterator[Finding]:
    """Findings that all ranks of a host share; one of them reports them."""
    bf16 = "fast" if cpu_backend.cpu_has_fast_bf16() else "slow"
    cores = len(os.sched_getaffinity(0))
    value = f"{cores} cores for this process, threads per rank: {torch.get_num_threads()}, {platform.machine()}"
    yield Finding(what="processor", value=f"{value}, {bf16} in bf16")
    memory = psutil.virtual_memory()
    yield Finding(what="memory", value=f"{in_bytes(memory.total)}, {in_bytes(memory.available)} available")
    if SHARED_MEMORY.is_dir():
        usage = shutil.disk_usage(SHARED_MEMORY)
        yield shared_memory_finding(usage.total, usage.free)
    if torch.cuda.is_available():
        yield locked_memory_finding(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    elif NVIDIA_DRIVER.exists():
        fix = (
            "There is an NVIDIA driver, but torch finds no CUDA device: install a CUDA build of torch for this driver, "
            "start the container with --gpus all, or check CUDA_VISIBLE_DEVICES."
        )
        yield Finding(what="GPUs", value="none that torch can use", status="warning", fix=fix)
    yield from settings_findings(os.environ)


def device_memory(local_ranks: int) -> int:
    """Bytes for one rank: its device's memory, or an equal part of the host's free memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return int(psutil.virtual_memory().available) // local_ranks


def shared_memory_finding(total: int, free: int) -> Finding:
    """Check of shared memory; ``total`` and ``free`` are bytes of /dev/shm."""
    value = f"{in_bytes(total)}, {in_bytes(free)} free in {SHARED_MEMORY}"
    if free >= SHARED_MEMORY_BYTES:
        return Finding(what="shared memory", value=value)
    fix = (
        f"Ranks of a host communicate through it, in NCCL and in torch, and less than {in_bytes(SHARED_MEMORY_BYTES)} "
        f"may not be enough: start the container with --shm-size 2g or --ipc host."
    )
    return Finding(what="shared memory", value=value, status="warning", fix=fix)


def locked_memory_finding(limit: int) -> Finding:
    """Check of the locked-memory limit; ``limit`` is that of ``ulimit -l`` in bytes."""
    if limit == _UNLIMITED:
        return Finding(what="locked memory", value="unlimited")
    fix = (
        "NCCL locks the buffers that network cards read, and fails beyond this limit: "
        "start the container with --ulimit memlock=-1, or raise `ulimit -l`."
    )
    return Finding(what="locked memory", value=f"at most {in_bytes(limit)}", status="warning", fix=fix)


def settings_findings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Names of the variables that are set; values are left out, since reports are shared."""
    names = sorted(name for name in environment if name.startswith(SETTINGS))
    if names:
        yield Finding(what="settings", value=f"{', '.join(names)} set, in the environment or by this program")


def device_finding(device: torch.device, backend: str) -> Finding:
    """Check of the rank's device with a small product in bf16, whose every entry is known."""
    value = f"CPU, {backend}"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        major, minor = torch.cuda.get_device_capability(device)
        value = (
            f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}, {in_bytes(total)}, "
            f"{free / total:.0%} free, {backend}"
        )
    try:
        ones = torch.ones(_SIDE, _SIDE, dtype=torch.bfloat16, device=device)
        is_right = bool((ones @ ones == _SIDE).all())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        fix = f"It does not compute ({reason}): install a torch that was built for this device and its driver."
        return Finding(what="device", value=value, status="wrong", fix=fix)
    if not is_right:
        fix = "A product of two matrices of ones is wrong, so the device is damaged: leave it out and have it tested."
        return Finding(what="device", value=value, status="wrong", fix=fix)
    if device.type == "cuda" and free < _FREE_SHARE * total:
        fix = "Another process uses some of its memory: end it (nvidia-smi shows which), or use another device."
        return Finding(what="device", value=value, status="warning", fix=fix)
    return Finding(what="device", value=value)


DISTRIBUTION = "hft-megatron"
OPTION = "--transformer-impl transformer_engine"
OWN_ROW = ("torch", "megatron-core", "transformers")
"""Packages with a row of their own; the others share one."""


def software_findings() -> Iterator[Finding]:
    """Versions, which must be the same on every rank, and optional packages."""
    yield Finding(what="hft-megatron", value=hft_megatron.__version__, same_everywhere=True)
    yield Finding(what="Python", value=f"{platform.python_version()} on {platform.system()} {platform.release()}")
    yield from package_findings(_requirements())
    yield _transformer_engine()
    yield _apex()


def package_findings(requirements: Sequence[Requirement]) -> Iterator[Finding]:
    """A row for each package of ``OWN_ROW``, and one for the others; wrong where one is missing or out of range."""
    by_name = {requirement.name: requirement for requirement in requirements}
    for name in OWN_ROW:
        requirement = by_name.get(name) or Requirement(name)
        yield _package(name, _with_builds(name), [requirement])
    others = [requirement for name, requirement in by_name.items() if name not in OWN_ROW]
    if others:
        versions = ", ".join(f"{one.name} {_version(one.name) or 'missing'}" for one in others)
        yield _package("other packages", versions, others)


def _package(what: str, value: str, requirements: Sequence[Requirement]) -> Finding:
    unmet = [one for one in requirements if not _is_met(one)]
    if not unmet:
        return Finding(what=what, value=value, same_everywhere=True)
    asked = " ".join(f"'{one.name}{one.specifier}'" for one in unmet)
    fix = f"The installed version does not meet hft-megatron's requirements: run `pip install {asked}`."
    return Finding(what=what, value=value, status="wrong", fix=fix, same_everywhere=True)


def _requirements() -> list[Requirement]:
    """Requirements of this package; none where it runs from a folder that was never installed."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.append(requirement)
    return found


def _is_met(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _with_builds(name: str) -> str:
    """The version; for torch with the target of its build."""
    version = _version(name) or "missing"
    if name != "torch":
        return version
    if torch.version.cuda is None:
        return f"{torch.__version__}, built without CUDA"
    nccl = ".".join(str(part) for part in torch.cuda.nccl.version()) if torch.cuda.is_available() else "not asked"
    return f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}"


def _transformer_engine() -> Finding:
    return _optional(
        "transformer-engine",
        "transformer_engine",
        can_be_used=bool(HAVE_TE),
        brings="attention, norms and a fused Adam in bf16 on CUDA",
    )


def _apex() -> Finding:
    # `apex` on PyPI is another project.
    return _optional(
        "Apex",
        "apex",
        can_be_used=find_spec("amp_C") is not None,
        brings="a fused Adam",
    )


def _optional(what: str, module: str, *, can_be_used: bool, brings: str) -> Finding:
    """Finding about an optional package, by the engine's import: an installed package may still fail to load."""
    for_what = f"only {OPTION} uses it, for {brings}"
    if can_be_used:
        return Finding(what=what, value=f"found: {for_what}", same_everywhere=True)
    if find_spec(module) is not None:
        value = f"installed, but its kernels cannot be loaded here; {for_what}"
        return Finding(what=what, value=value, same_everywhere=True)
    return Finding(what=what, value=f"not installed: {for_what}", same_everywhere=True)
