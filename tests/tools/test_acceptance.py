"""The acceptance run: its toy of both parts on CPU, faults that it must notice, and checks that hang or crash."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import acceptance
import psutil
import pytest
import result_lines
from check_list import Check, checks_of
from check_losses import compare, words_of
from check_ranks import PP, SPLIT, TP
from product import GRAD_NORM, LOSS, Run
from result_lines import Results, table
from working_site import Site

from tests.support.forked import clean_environment, run
from tests.support.ranks import RankPools
from tests.support.runs import run_sft_words

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = str(REPOSITORY / "tools" / "gpu" / "acceptance.py")
PLANTED = str(Path(__file__).with_name("planted_faults.py"))
TOY = "toys of checks that train take a minute"
HEADER = {"header": True, "card": "cpu", "part": "correctness", "ranks": 1, "toy": True, "commit": "abc"}
MODULE = "tests.tools.fake_checks"


def fake(name: str, function: str = "passes", limit_s: float = 60.0) -> Check:
    """A check that needs no product, in a process of its own as the one that installs it."""
    return Check(name=name, title=name, limit_s=limit_s, target=f"{MODULE}:{function}", alone=True)


def outcomes(folder: Path, *checks: Check) -> Results:
    """What becomes of checks, with their limits as they are given, since nothing here is a toy."""
    results = Results(file=folder / "results.jsonl", header=HEADER)
    results.begin()
    acceptance.Acceptance(results, folder).run(checks)
    return results


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_crashes_hangs_or_fails_is_noted_and_the_next_check_runs(tmp_path: Path) -> None:
    checks = [fake("fails", "fails"), fake("crashes", "crashes"), fake("hangs", "hangs", 2.0), fake("passes")]
    results = outcomes(tmp_path, *checks)
    found = {name: (line["passed"], line.get("why")) for name, line in results.by_name.items()}
    assert found == {
        "fails": (False, "two and two are five"),
        "crashes": (False, "the worker ended with exit code -9"),
        "hangs": (False, "not finished after its limit of 2 s"),
        "passes": (True, None),
    }
    assert [line["check"] for line in lines_of(results.file)[1:]] == [check.name for check in checks]
    # What the check that hung had started is gone too.
    assert is_gone((tmp_path / "worker-3" / "child").read_text())
    shown = table([(check.name, check.title) for check in checks], results)
    assert shown.count("FAILED") == 3
    assert "two and two are five" in shown


def test_a_run_that_is_cut_off_keeps_its_results_and_resumes_from_there(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    lines = [
        HEADER,
        {"check": "one", "passed": True, "seconds": 1.0},
        {"check": "two", "passed": False, "seconds": 1.0},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"check": "thr')
    results = Results(file=file, header=HEADER)
    results.resume_from(file)
    assert [results.passed(name) for name in ("one", "two", "three")] == [True, False, False]
    other = Results(file=file, header=HEADER | {"card": "another"})
    other.resume_from(file)
    assert not other.passed("one")


@pytest.mark.parametrize(
    ("words", "part_of_sentence"),
    [
        (["--only", "99"], "--only 99 is not one of 0, 1, 2,"),
        (["--ranks", "2", "--part", "speed"], "--ranks 2 must be"),
        (["--resume", "/nowhere"], "--resume /nowhere cannot be read"),
    ],
)
def test_a_mistake_in_the_options_is_a_sentence(
    words: list[str], part_of_sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert acceptance.main([*words, "--toy"]) == 2
    assert part_of_sentence in capsys.readouterr().err


def test_the_parent_imports_neither_torch_nor_the_product() -> None:
    code = "import sys, acceptance; print({'torch', 'hft_megatron', 'numpy'} & set(sys.modules))"
    environment = clean_environment(PYTHONPATH=str(REPOSITORY / "tools" / "gpu"))
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) == "set()\n"


@pytest.mark.parametrize("part", ["correctness", "speed"])
def test_the_limits_of_a_part_are_under_seven_minutes(part: str) -> None:
    assert sum(check.limit_s for check in checks_of(part, 1)) < 7 * 60


def test_results_are_named_after_the_card() -> None:
    header = {"card": "NVIDIA H100 80GB HBM3", "date": "2026-05-04 12:00:00"}
    assert result_lines.default_file(header).name == "nvidia-h100-80gb-hbm3-2026-05-04.jsonl"


def toy(folder: Path, *words: str) -> list[dict[str, Any]]:
    """Runs the program on CPU; the lines of its results, all of checks that have passed."""
    output = folder / "results.jsonl"
    done = run([PROGRAM, "--toy", "--output", str(output), *words], folder, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    lines = lines_of(output)
    assert all(line["passed"] for line in lines[1:])
    return lines


@pytest.mark.slow(reason=TOY)
def test_the_correctness_part_passes_on_cpu(tmp_path: Path) -> None:
    header, *checks = toy(tmp_path, "--part", "correctness")
    assert header["card"] == "cpu"
    assert [line["check"] for line in checks] == [check.name for check in checks_of("correctness", 1)]


@pytest.mark.slow(reason=TOY)
def test_the_speed_part_runs_on_cpu(tmp_path: Path) -> None:
    _, *checks = toy(tmp_path, "--part", "speed", "--only", "8", "9", "10", "11", "12")
    measured = {line["check"]: line["measured"] for line in checks}
    assert measured["8"]["half: tokens/s"] > 0
    assert measured["8"]["transformers: model TFLOP/s"] > 0
    assert measured["12"]["save GB/s"] > 0


@pytest.mark.slow(reason=TOY)
def test_two_ranks_learn_what_one_does_and_a_killed_rank_resumes(tmp_path: Path) -> None:
    names = [check.name for check in checks_of("correctness", 2)[1:]]
    _, *checks = toy(tmp_path, "--ranks", "2", "--only", *names)
    assert [line["check"] for line in checks] == ["tp", "pp", "dp", "overlap", "async", "killed"]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("world_size", "options"),
    [pytest.param(4, (*TP, *PP, *SPLIT), marks=pytest.mark.slow(reason="four ranks")), (2, SPLIT)],
)
def test_tp_2_x_pp_2_and_dp_2_have_the_reference_losses(
    ranks: RankPools, tmp_path: Path, world_size: int, options: tuple[object, ...]
) -> None:
    site = Site(folder=tmp_path, toy=True)
    words = [str(word) for word in (*words_of(site, "plain"), *options)]
    steps = ranks(world_size).run(run_sft_words, words=words)[-1]["steps"]
    metrics = [{LOSS: step["loss"], GRAD_NORM: step["grad_norm"]} for step in steps]
    compare(site, Run(metrics=metrics, said="", peak_bytes=0), "plain")


@pytest.mark.slow(reason="each of four faults is trained with")
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("weight_gradient", "is off by"),
        ("packed_attention", "the lm loss of step 1 is"),
        ("resume", "resumed after a sync save: a run that was not stopped has other losses"),
        ("audit", "instead of 1"),
    ],
)
def test_a_planted_fault_fails_its_check(tmp_path: Path, fault: str, sentence: str) -> None:
    done = run([PLANTED, fault, str(tmp_path)], tmp_path, timeout=600)
    [line] = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines() if "passed" in line]
    assert done.returncode == 1, done.stdout
    assert not line["passed"]
    assert sentence in line["why"]


@pytest.mark.gpu
@pytest.mark.slow(reason="starts on a card")
def test_a_card_learns_what_the_cpu_learns(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    assert acceptance.main(["--only", "0", "2", "--output", str(output)]) == 0, output.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_workers_too(tmp_path: Path, number: signal.Signals) -> None:
    code = f"""
import acceptance, sys
hangs = acceptance.Check(name="hangs", title="hangs", limit_s=600, target="{MODULE}:hangs", alone=True)
acceptance.checks_of = lambda part, ranks: [hangs]
sys.exit(acceptance.main(["--toy", "--output", sys.argv[1]]))
"""
    words = [sys.executable, "-c", code, str(tmp_path / "results.jsonl")]
    environment = clean_environment(PYTHONPATH=str(REPOSITORY / "tools" / "gpu"), TMPDIR=str(tmp_path))
    with subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL) as process:
        while not (noted := list(tmp_path.glob("acceptance-*/worker-1/child"))):
            assert process.poll() is None
        child = noted[0].read_text()
        process.send_signal(number)
        process.wait(60)
    assert is_gone(child)


def is_gone(pid: str) -> bool:
    """Whether a process has ended; its new parent may not have asked about it yet."""
    try:
        return psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
