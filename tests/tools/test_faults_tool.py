"""Every planted fault is in form and applies, and the tool finds out what a run of pytest came to."""

import ast
import contextlib
import io
import shutil
import signal
import subprocess
import sys
import time
import tokenize
from pathlib import Path

import faults
import psutil
import pytest

PARTS = {
    "selection rule",
    "plan digest",
    "TP slice, column-parallel",
    "TP slice, row-parallel",
    "TP slice, vocabulary",
    "weight gradient of a frozen matrix",
    "sequence-parallel reduction",
    "padded vocabulary",
    "tied embedding at PP 2",
    "clipping",
    "decay of a norm",
    "accumulation",
    "loss normaliser",
    "packing boundary",
    "positions",
    "RoPE scaling",
    "carried moments",
    "step count",
    "order on resume",
    "random state",
    "layout change",
    "export dtype",
    "DPO reference",
    "label shift",
    "template span",
    "order of data",
    "torn checkpoint",
    "largest moments of a whole matrix",
}
FAULTS = faults.read_faults(faults.FAULTS, [])
FAILING = {
    "a test": ("FAILED tests/a.py::test_b - assert 1 == 2", "tests/a.py::test_b"),
    "a case": ("FAILED tests/a.py::test_b[tp1 - pp2] - x - y", "tests/a.py::test_b[tp1 - pp2]"),
    "a fixture": ("ERROR tests/a.py::test_b[c d]", "tests/a.py::test_b[c d]"),
    "a file": ("ERROR tests/a.py - ImportError: no b", "tests/a.py"),
}
"""Lines of pytest's summary, and the test or file that failed."""


def git(*words: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="session", autouse=True)
def repository() -> Path:
    if shutil.which("git") is None or git("rev-parse", "HEAD", folder=faults.REPOSITORY).returncode != 0:
        pytest.skip("patches are checked with git, and there is no git repository here")
    return faults.REPOSITORY


def files_of(fault: faults.Fault) -> list[str]:
    lines = fault.patch.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("+++ b/") for line in lines if line.startswith("+++ ")]


def tokens_of(text: str) -> list[str]:
    """Tokens that Python acts on."""
    unread = (tokenize.COMMENT, tokenize.NL)
    return [one.string for one in tokenize.generate_tokens(io.StringIO(text).readline) if one.type not in unread]


def test_every_part_has_one_fault_and_most_faults_are_one_token() -> None:
    assert sorted(fault.part for fault in FAULTS) == sorted(PARTS)
    assert sum(fault.one_token for fault in FAULTS) >= 15


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_a_sentence_and_names_tests_that_are_there(fault: faults.Fault, repository: Path) -> None:
    assert fault.subject[0].isupper()
    assert fault.subject.endswith(".")
    assert 1 <= len(fault.tests) <= 4
    assert [path for path in fault.tests if not (repository / path).exists()] == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_applies_to_the_product_alone_and_the_result_compiles(
    fault: faults.Fault, repository: Path, tmp_path: Path
) -> None:
    files = files_of(fault)
    assert files
    assert all(file.startswith("hft_megatron/") for file in files)
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / file, tmp_path / file)
    # Without a repository around it git applies a patch to plain files.
    applied = git("apply", str(fault.patch), folder=tmp_path)
    assert applied.returncode == 0, applied.stderr
    before, after = ([(root / file).read_text(encoding="utf-8") for file in files] for root in (repository, tmp_path))
    assert all(ast.dump(ast.parse(old)) != ast.dump(ast.parse(new)) for old, new in zip(before, after, strict=True))
    if fault.one_token:
        [old], [new] = ([tokens_of(text) for text in texts] for texts in (before, after))
        assert len(old) == len(new)
        assert sum(one != other for one, other in zip(old, new, strict=True)) == 1


def test_a_header_out_of_form_is_refused(tmp_path: Path) -> None:
    patch = tmp_path / "odd.patch"
    patch.write_text("Subject: Odd.\nPart: odd\nToken: perhaps\nTests: tests/odd.py\n\n")
    with pytest.raises(faults.FaultError, match="must be yes or no"):
        faults.read_fault(patch)
    patch.write_text("Subject: Odd.\n")
    with pytest.raises(faults.FaultError, match="must begin with the lines Subject:, Part:, Token:, Tests:"):
        faults.read_fault(patch)


@pytest.mark.parametrize("what", FAILING)
def test_the_failing_test_is_read_from_the_summary(what: str) -> None:
    line, test = FAILING[what]
    assert faults.first_caught(1, f"FAILED no::test\n=== short test summary info ===\nSKIPPED [1] x\n{line}\n") == test


def test_only_failing_tests_imports_and_silence_catch_a_fault() -> None:
    summary = "=== short test summary info ===\nERROR tests/a.py\n"
    assert faults.first_caught(0, "") is None
    assert faults.first_caught(5, "") is None
    assert faults.first_caught(2, f"E   ImportError: no b\n{summary}") == "tests/a.py"
    assert (
        faults.first_caught(None, "tests/a.py::test_b PASSED\ntests/a.py::test_c ")
        == "tests/a.py::test_c (a test hung)"
    )
    for code, said in ((2, summary), (4, summary), (1, "")):
        with pytest.raises(RuntimeError, match=f"pytest ended with {code}"):
            faults.first_caught(code, said)


def test_a_fault_counts_as_slow_after_all_quick_tests() -> None:
    tiers = [(tier, "tests/a.py" in words) for tier, words in faults.selections(["tests/a.py"])]
    assert tiers == [("quick", True), ("quick", False), ("slow", True), ("slow", False)]
    assert [tier for tier, _ in faults.selections([])] == ["quick", "slow"]


def test_silence_ends_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_hang.py").write_text("import time\ndef test_hang():\n    time.sleep(100)\n")
    assert faults.run_pytest(tmp_path, ["test_hang.py"], tmp_path / "log", silence_s=0) is None


def test_what_hangs_is_ended_with_what_it_started_in_a_session_of_its_own() -> None:
    program = "import subprocess\nprint(subprocess.Popen(['sleep', '100'], start_new_session=True).pid, flush=True)\n"
    words = [sys.executable, "-c", f"{program}import time\ntime.sleep(100)\n"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        faults.end(process)
        assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    with contextlib.suppress(psutil.NoSuchProcess):
        while child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_the_table_counts_what_was_caught_and_what_was_missed() -> None:
    tried = [("quick", "tests/a.py::test[x|y]"), ("missed", "")]
    results = [
        faults.Result(fault=fault, tier=tier, test=test, seconds=1.6)
        for fault, (tier, test) in zip(FAULTS, tried, strict=False)
    ]
    text = faults.table(results, len(FAULTS), "abc")
    assert "1 caught by the quick tests, 0 by the slow tests, 1 missed" in text
    assert f"| {FAULTS[0].name} | {FAULTS[0].part} | yes | quick | `tests/a.py::test[x\\|y]` | 2 |" in text
