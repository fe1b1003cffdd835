"""Versions and optional packages. Run: pytest tests/doctor/test_software.py"""

import pytest
from packaging.requirements import Requirement

from hft_megatron.doctor import machine
from hft_megatron.doctor.machine import package_findings, software_findings


def test_a_package_out_of_range_is_wrong_and_the_fix_installs_it() -> None:
    found = {finding.what: finding for finding in package_findings([Requirement("torch>=99"), Requirement("numpy>=1")])}
    assert found["torch"].status == "wrong"
    assert "run `pip install 'torch>=99'`" in str(found["torch"].fix)
    assert found["other packages"].status == "ok"


def test_a_missing_package_is_named_among_the_others() -> None:
    requirements = [Requirement("numpy>=1"), Requirement("no-such-package>=2"), Requirement("psutil>=99")]
    other = list(package_findings(requirements))[-1]
    assert "no-such-package missing" in other.value
    assert "run `pip install 'no-such-package>=2' 'psutil>=99'`" in str(other.fix)


def test_versions_are_compared_over_ranks() -> None:
    compared = {finding.what for finding in software_findings() if finding.same_everywhere}
    assert {"hft-megatron", "torch", "megatron-core", "transformers", "transformer-engine", "Apex"} <= compared


def test_optional_packages_are_no_warning_and_name_the_option_that_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    monkeypatch.setattr(machine, "HAVE_TE", False)
    finding = machine._transformer_engine()
    assert finding.status == machine._apex().status == "ok"
    for_what = (
        "only --transformer-impl transformer_engine uses it, for attention, norms and a fused Adam in bf16 on CUDA"
    )
    assert finding.value == f"not installed: {for_what}"
    monkeypatch.setattr(machine, "find_spec", lambda name: object())
    assert machine._transformer_engine().value == f"installed, but its kernels cannot be loaded here; {for_what}"
    monkeypatch.setattr(machine, "HAVE_TE", True)
    assert machine._transformer_engine().value == f"found: {for_what}"
