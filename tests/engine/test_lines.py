"""Which megatron-core is supported, and what is said of any other. Run: pytest tests/engine/test_lines.py"""

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hft_megatron.engine import lines
from hft_megatron.errors import UserError


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What ``engine_line`` finds, by name; it is asked anew in the test and after it."""
    versions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(lines, "find_spec", lambda name: versions.get(name))
    lines.engine_line.cache_clear()
    yield versions
    lines.engine_line.cache_clear()


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("0.16.0", None),
        ("0.16.1", "0.16"),
        ("0.16.5", "0.16"),
        ("0.17.1", None),
        ("0.18.1", None),
        ("0.19.0", "0.19"),
        ("0.19.2", "0.19"),
        ("0.20.0", None),
    ],
)
def test_a_release_belongs_to_one_of_two_lines_or_to_none(version: str, name: str | None) -> None:
    line = lines.line_of(version)
    assert (line and line.name) == name


def test_a_release_of_no_line_is_refused_with_the_command_for_this_python(installed: dict[str, str]) -> None:
    installed["megatron-core"] = "0.17.1"
    wanted = "<0.17,>=0.16.1" if sys.version_info < (3, 12) else "<0.20,>=0.19"
    with pytest.raises(UserError) as refused:
        lines.engine_line()
    assert str(refused.value) == (
        "megatron-core 0.17.1 is installed, but only 0.16 (<0.17,>=0.16.1) and 0.19 "
        f"(<0.20,>=0.19) are supported; run `pip install 'megatron-core{wanted}'`."
    )


def test_no_engine_at_all_is_one_sentence(installed: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"^megatron-core is not installed; run `pip install 'megatron-core<"):
        lines.engine_line()


def test_the_newer_line_asks_for_triton_and_the_older_does_not(installed: dict[str, str]) -> None:
    installed["megatron-core"] = "0.19.2"
    with pytest.raises(UserError, match=r"^megatron-core 0.19.2 imports triton .* `pip install triton`"):
        lines.engine_line()
    installed["triton"] = "3.6.0"
    assert lines.engine_line().name == "0.19"
    lines.engine_line.cache_clear()
    del installed["triton"]
    installed["megatron-core"] = "0.16.1"
    assert lines.engine_line().name == "0.16"


def test_a_checkpoint_of_the_newer_line_is_refused_by_the_older_alone(installed: dict[str, str]) -> None:
    installed |= {"megatron-core": "0.16.1", "triton": "3.6.0"}
    checkpoint, files = Path("run/iter_0000002"), ["metadata.json", ".metadata", "__0_0.distcp"]
    with pytest.raises(UserError) as refused:
        lines.refuse_if_unreadable(checkpoint, files)
    assert str(refused.value) == (
        "--load run: iter_0000002 was saved with megatron-core 0.19 and cannot be read with 0.16; resume with "
        "Python 3.12 or newer, where pip installs 0.19."
    )
    lines.refuse_if_unreadable(checkpoint, [*files, "common.pt"])
    installed["megatron-core"] = "0.19.2"
    lines.engine_line.cache_clear()
    lines.refuse_if_unreadable(checkpoint, files)


def test_pip_is_asked_for_the_line_of_each_python() -> None:
    asked = [Requirement(line) for line in metadata.requires("hft-megatron") or [] if line.startswith("megatron-core")]
    assert len(asked) == 2
    for python, line in (("3.10", lines.LINES[0]), ("3.11", lines.LINES[0]), ("3.12", lines.LINES[1])):
        [found] = [one for one in asked if one.marker and one.marker.evaluate({"python_version": python})]
        assert found.specifier == line.versions, python
