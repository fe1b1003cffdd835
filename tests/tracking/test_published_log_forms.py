"""What reads Megatron-LM's log reads this one: the fields of its line, in its order and its forms of numbers.

The forms are those of Megatron-LM's ``training_log`` with --log-throughput, and what parsers of its users look for:
the whole line in order, single fields anywhere, min and max of timers, losses of validations, checkpoints.
Run: pytest tests/tracking/test_published_log_forms.py
"""

import re
from datetime import datetime
from pathlib import Path

import pytest

from hft_megatron.tracking.console import iteration_line, timer_lines, validation_line
from hft_megatron.tracking.tracker import dashboard_metrics
from tests.support.runs import make_inputs, run_cli, words_for, write_data

MEASURED = {
    "consumed samples": 320,
    "elapsed time per iteration (ms)": 812.34,
    "throughput per GPU (TFLOP/s/GPU)": 401.23,
    "learning rate": 1e-5,
    "global batch size": 32,
    "lm loss": 1.234567,
    "grad norm": 1.2344,
    "num zeros": 17,
    "params norm": 240.5,
    "round": 2,
    "tokens per GPU (tokens/s/GPU)": 9876.54,
    "slowest rank": "rank 1 on node-a (TP 0, PP 0, DP 1), 1.50 x the median compute time",
    "max allocated memory (GB)": 69.5,
    "time left (s)": 7.4,
    "optimizer time, fastest rank (ms)": 3.5,
    "optimizer time, slowest rank (ms)": 4.25,
}
NOW = datetime(2026, 8, 22, 10, 0, 0, 123456)
LINE = iteration_line(10, 100, MEASURED, now=NOW)
DECIMAL, SCIENTIFIC = r"([\d.]+)", r"([\d.E+-]+)"


def in_order(*fields: tuple[str, str]) -> str:
    """A pattern of these fields, each behind the other, with nothing between."""
    return r"\s*\|\s*".join(rf"{re.escape(name)}:\s*{value}" for name, value in fields)


FRONT = (
    ("consumed samples", r"(\d+)"),
    ("elapsed time per iteration (ms)", DECIMAL),
    ("throughput per GPU (TFLOP/s/GPU)", DECIMAL),
    ("learning rate", SCIENTIFIC),
    ("global batch size", r"(\d+)"),
    ("lm loss", SCIENTIFIC),
    ("loss scale", DECIMAL),
    ("grad norm", DECIMAL),
)
MORE = (("num zeros", r"(\d+)"), ("params norm", DECIMAL))
BACK = (("number of skipped iterations", r"(\d+)"), ("number of nan iterations", r"(\d+)"))


HEAD = r"^ \[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[.\d]*\]\s*iteration\s+(\d+)/\s*(\d+)\s*\|\s*"
TIMER = r"^\s*([A-Za-z0-9_-]+)\s+\.+:\s+\(([0-9.]+),\s*([0-9.]+)\)"
VALIDATION = r"validation loss at iteration (\d+) \| lm loss value: ([0-9.E+-]+) \| lm loss PPL: ([0-9.E+-]+)"


def test_a_pattern_of_the_whole_line_finds_every_number() -> None:
    found = re.search(HEAD + in_order(*FRONT, *MORE, *BACK) + r"\s*\|", LINE)
    assert found is not None, LINE
    assert found[1] == "2026-08-22 10:00:00"
    numbers = [10, 100, 320, 812.3, 401.2, 1e-5, 32, 1.234567, 1.0, 1.234, 17, 240.5, 0, 0]
    assert [float(number) for number in found.groups()[1:]] == numbers


def test_a_line_without_what_was_not_asked_for_has_no_gap() -> None:
    asked = {"num zeros", "params norm"}
    line = iteration_line(10, 100, {name: value for name, value in MEASURED.items() if name not in asked}, now=NOW)
    assert re.search(r" iteration\s+(\d+)/\s*(\d+) \|\s*" + in_order(*FRONT, *BACK), line)


def test_every_field_can_be_split_off_at_the_bars() -> None:
    head, *fields, end = LINE.split("|")
    assert (head.split()[2:], end) == (["iteration", "10/", "100"], "")
    found = dict(field.strip().split(": ", 1) for field in fields)
    assert float(found["lm loss"]) == 1.234567
    assert all(name == name.strip() and value for name, value in found.items())


@pytest.mark.parametrize(
    ("pattern", "number"),
    [
        (r" iteration\s+\d+/\s*\d+\s*\|[^\n]*lm loss:\s*([\d.eE+\-]+)", 1.234567),
        (r"iteration\s+\d+/.*elapsed time per iteration \(ms\): ([\d.]+)", 812.3),
        (r"throughput per GPU \(TFLOP/s/GPU\):\s+([0-9.]+)(?:\s|$|\|)", 401.2),
        (r"grad norm:\s*([+\-0-9.Ee]+).*?params norm:\s*[+\-0-9.Ee]+.*?number of nan iterations:\s*\d+", 1.234),
        (r"number of nan iterations:\s+(\d+) \|", 0),
    ],
)
def test_single_fields_are_found_anywhere_in_the_line(pattern: str, number: float) -> None:
    found = re.search(pattern, LINE)
    assert found is not None
    assert float(found[1]) == number


def test_timers_are_found_with_their_least_and_most() -> None:
    head, *lines = timer_lines(MEASURED).splitlines()
    assert head == "(min, max) time across ranks (ms):"
    [found] = [re.match(TIMER, line) for line in lines]
    assert found is not None
    assert found.groups() == ("optimizer", "3.50", "4.25")


def test_validation_losses_are_found() -> None:
    line = validation_line(10, {"lm loss validation": 1.2})
    found = re.search(VALIDATION, line)
    assert found is not None
    assert (int(found[1]), float(found[2]), float(found[3])) == (10, 1.2, 3.320117)


def test_dashboards_have_the_tags_that_megatrons_own_tests_read() -> None:
    tags = {"iteration-time", "lm loss", "num-zeros", "mem-max-allocated-bytes", "grad-norm", "params-norm"}
    assert tags <= dashboard_metrics(MEASURED).keys()


@pytest.mark.slow(reason="a whole run of two ranks as its user sees it")
def test_the_log_of_a_run_is_read_from_its_first_iteration_to_its_checkpoint(tmp_path: Path) -> None:
    options = ["--log-params-norm", "--log-num-zeros-in-grad", "--timing-log-level", 2, "--eval-interval", 2]
    options += ["--valid-data-path", write_data(tmp_path / "valid.jsonl", 5), "--save", tmp_path / "run"]
    words = words_for(make_inputs(tmp_path), "--train-iters", 3, *options)
    assert run_cli(words, ranks=2, log=tmp_path / "log") == 0
    log = (tmp_path / "log").read_text()

    def found(pattern: str) -> list[tuple[str, ...]]:
        return re.findall(pattern, log, re.MULTILINE)

    lines = found(HEAD + in_order(*FRONT, *MORE, *BACK) + r"\s*\|")
    assert [(line[1], line[3]) for line in lines] == [("1", "4"), ("2", "8"), ("3", "12")]
    timers = [name for name, _, _ in found(TIMER)]
    assert timers == 3 * ["all-grads-sync", "params-all-gather", "optimizer", "forward-compute", "backward-compute"]
    assert [iteration for iteration, _, _ in found(VALIDATION)] == ["2", "3"]
    assert found(r"saving checkpoint at iteration\s+(\d+) to \S+ in torch_dist format") == ["3"]
    assert found(r"successfully saved checkpoint from iteration\s+(\d+) to \S+ \[ t 1, p 1 \]") == ["3"]
