"""Which packages are installed, whether they are recent enough, and what uses the optional ones."""

import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from packaging.requirements import InvalidRequirement, Requirement

import hft_megatron
from hft_megatron.training.doctor.findings import Finding

DISTRIBUTION = "hft-megatron"
OPTION = "--transformer-impl transformer_engine"
OWN_ROW = ("torch", "megatron-core", "transformers")
"""What a report is asked for first; the other packages share a row."""


def software_findings() -> Iterator[Finding]:
    """Versions, which must be the same on every rank, and the packages that are used where they are found."""
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
    fix = f"What is installed is not what hft-megatron needs: run `pip install {asked}`."
    return Finding(what=what, value=value, status="wrong", fix=fix, same_everywhere=True)


def _requirements() -> list[Requirement]:
    """What this package asks for here; nothing where it runs from a folder that was never installed."""
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
    """The version; for torch with what its build was made for."""
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
    """By what the engine found when it was imported: a package that is there but can't be loaded is no use."""
    for_what = f"only {OPTION} uses it, for {brings}"
    if can_be_used:
        return Finding(what=what, value=f"found: {for_what}", same_everywhere=True)
    if find_spec(module) is not None:
        value = f"installed, but its kernels can't be loaded here; {for_what}"
        return Finding(what=what, value=value, same_everywhere=True)
    return Finding(what=what, value=f"not installed: {for_what}", same_everywhere=True)
