import fcntl
import io
import os
import pty
import re
import select
import struct
import termios
from datetime import datetime
from typing import TextIO

import pytest

from hft_megatron.tracking.console import ConsoleTracker, iteration_line, validation_line

METRICS = {
    "consumed samples": 320,
    "elapsed time per iteration (ms)": 812.34,
    "learning rate": 1e-5,
    "decoupled learning rate": 1e-6,
    "global batch size": 32,
    "lm loss": 1.234567,
    "grad norm": 1.2344,
    "round": 2,
    "trainable params": 3500,
    "frozen params": 3200,
    "plan digest": "5d292724e909",
    "bytes reduced": 123,
}


class Terminal(io.TextIOWrapper):
    """A real one, of so many columns."""

    def __init__(self, columns: int = 80) -> None:
        self._seen = ""
        self._screen, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        super().__init__(io.FileIO(terminal, "w"), encoding="utf-8", write_through=True)

    def getvalue(self) -> str:
        """All that was written to it."""
        # The kernel hands it over on a thread of its own.
        while select.select([self._screen], [], [], 0.2)[0]:
            self._seen += os.read(self._screen, 1 << 16).decode()
        return self._seen


def log_two(output: TextIO, progress: TextIO) -> None:
    console = ConsoleTracker(train_iters=100, start_iteration=8, output=output, progress=progress)
    console.log(10, METRICS)
    console.log(10, {"lm loss validation": 1.2})
    console.close()


def test_the_iteration_line_is_megatrons_to_the_character() -> None:
    line = iteration_line(10, 100, METRICS, now=datetime(2026, 8, 22, 10, 0, 0, 123456))
    assert line == (
        " [2026-08-22 10:00:00.123456] iteration       10/     100 | consumed samples:          320 |"
        " elapsed time per iteration (ms): 812.3 | learning rate: 1.000000E-05 |"
        " decoupled learning rate: 1.000000E-06 | global batch size:    32 |"
        " lm loss: 1.234567E+00 | loss scale: 1.0 | grad norm: 1.234 | number of skipped iterations:   0 |"
        " number of nan iterations:   0 | round: 2 |"
    )


def test_megatrons_other_fields_stand_where_megatron_puts_them() -> None:
    metrics = {"number of nan iterations": 1, "number of skipped iterations": 2, "params norm": 12.5, "num zeros": 7}
    line = iteration_line(1, 1, {**metrics, "grad norm": 1.234, "lm loss": 2.0}, now=datetime(2026, 1, 1))
    assert line.endswith(
        "| lm loss: 2.000000E+00 | loss scale: 1.0 | grad norm: 1.234 | num zeros: 7 | params norm: 12.500 |"
        " number of skipped iterations:   2 | number of nan iterations:   1 |"
    )


def test_times_over_ranks_are_megatrons_lines_below_the_iteration(capsys: pytest.CaptureFixture[str]) -> None:
    times = {"optimizer time, fastest rank (ms)": 0.25, "optimizer time, slowest rank (ms)": 12.346}
    times |= {"all-gather wait, fastest rank (ms)": 0.0, "all-gather wait, slowest rank (ms)": 0.0}
    ConsoleTracker(train_iters=9, start_iteration=0, progress=io.StringIO()).log(1, {**METRICS, **times})
    iteration, *lines = capsys.readouterr().out.splitlines()
    assert "] iteration        1/" in iteration
    assert lines == [
        "(min, max) time across ranks (ms):",
        "    optimizer ......................................: (0.25, 12.35)",
    ]


def test_the_rates_stand_where_megatron_puts_throughput_and_the_time_left_ends_the_line() -> None:
    rates = {
        "time left (s)": 90061.4,
        "elapsed time per iteration (ms)": 812.3,
        "throughput per GPU (TFLOP/s/GPU)": 401.23,
        "actual throughput per GPU (TFLOP/s/GPU)": 334.5,
        "tokens per GPU (tokens/s/GPU)": 9876.54,
        "max allocated memory (GB)": 69.496,
        "round": 2,
    }
    line = iteration_line(1, 1, rates, now=datetime(2026, 1, 1))
    assert line.endswith(
        "| elapsed time per iteration (ms): 812.3 | throughput per GPU (TFLOP/s/GPU): 401.2 | loss scale: 1.0 |"
        " number of skipped iterations:   0 | number of nan iterations:   0 | round: 2 |"
        " tokens per GPU (tokens/s/GPU): 9876.5 | actual throughput per GPU (TFLOP/s/GPU): 334.5 |"
        " max allocated memory (GB): 69.50 | time left: 1 day, 1:01:01 |"
    )


@pytest.mark.parametrize("name", ["lm loss", "preference loss"])
def test_the_bar_shows_loss_rate_gradient_norm_tokens_per_second_and_time_left_on_80_columns(name: str) -> None:
    progress = Terminal()
    console = ConsoleTracker(train_iters=9000, start_iteration=0, output=Terminal(), progress=progress)
    console.log(
        4500, {name: 1.25, "learning rate": 1e-5, "grad norm": 12.3456, "tokens per GPU (tokens/s/GPU)": 123456.7}
    )
    console.close()
    last = progress.getvalue().rstrip().split("\r")[-1]
    assert re.fullmatch(r"4500/9000\|.+\| \d\d:\d\d left, loss 1.2500 lr 1.00e-05 norm 12.3 123,457 tok/s/GPU", last)


@pytest.mark.parametrize("columns", [0, 80])
def test_a_terminal_that_says_it_has_no_columns_gets_lines(columns: int) -> None:
    output, progress = Terminal(), Terminal(columns)
    log_two(output, progress)
    assert ("] iteration       10/" in output.getvalue()) == (columns == 0)
    assert ("10/100" in progress.getvalue()) == (columns > 0)


def test_the_validation_line_is_megatrons_to_the_character() -> None:
    assert validation_line(100, {"lm loss validation": 1.2}) == (
        " validation loss at iteration 100 | lm loss value: 1.200000E+00 | lm loss PPL: 3.320117E+00 | "
    )


def test_the_perplexity_of_a_diverged_loss_is_bounded_as_in_megatron() -> None:
    assert "lm loss PPL: 4.851652E+08" in validation_line(1, {"lm loss validation": 1000.0})


def test_nobody_watching_gives_plain_lines_only() -> None:
    output, progress = io.StringIO(), io.StringIO()
    log_two(output, progress)
    lines = output.getvalue().splitlines()
    assert len(lines) == 4
    assert re.match(r" \[[-0-9]{10} [:.0-9]{15}\] iteration       10/     100 \| consumed samples:", lines[0])
    assert lines[1] == lines[3] == "-" * len(lines[2])
    assert lines[2].startswith(" validation loss at iteration 10 |")
    assert progress.getvalue() == ""


def test_a_person_at_a_terminal_gets_a_bar_and_the_validation_above_it() -> None:
    output, progress = Terminal(), Terminal()
    log_two(output, progress)
    assert "10/100" in progress.getvalue()
    assert "] iteration" not in output.getvalue()
    assert "validation loss at iteration 10" in output.getvalue()


def test_output_kept_in_a_file_has_the_lines_although_a_person_watches_the_bar() -> None:
    output, progress = io.StringIO(), Terminal()
    log_two(output, progress)
    assert "10/100" in progress.getvalue()
    assert "] iteration       10/" in output.getvalue()


def test_the_bar_of_a_resumed_run_starts_where_the_run_resumed() -> None:
    progress = Terminal()
    ConsoleTracker(train_iters=100, start_iteration=40, output=Terminal(), progress=progress).close()
    assert "40/100" in progress.getvalue()


@pytest.mark.parametrize("missing", ["lm loss", "grad norm", "round"])
def test_a_field_that_was_not_measured_is_not_on_the_line(missing: str) -> None:
    metrics = {name: value for name, value in METRICS.items() if name != missing}
    assert f" {missing}:" not in iteration_line(1, 1, metrics, now=datetime(2026, 1, 1))


def test_a_validation_of_several_sources_shows_each_by_its_name() -> None:
    output = io.StringIO()
    tracker = ConsoleTracker(train_iters=10, start_iteration=0, output=output, progress=io.StringIO())
    tracker.log(5, {"lm loss validation": 1.2, "lm loss validation/a validation": 1.2})
    values = "lm loss{0} value: 1.200000E+00 | lm loss{0} PPL: 3.320117E+00 | "
    shown = values.format("") + values.format(" validation/a validation")
    assert f"validation loss at iteration 5 | {shown}" in output.getvalue()


def test_a_validation_of_pairs_shows_everything_that_was_measured() -> None:
    output = io.StringIO()
    tracker = ConsoleTracker(train_iters=10, start_iteration=0, output=output, progress=io.StringIO())
    tracker.log(5, {"preference loss validation": 0.5, "rewards/accuracies validation": 0.75})
    assert "validation loss at iteration 5 | preference loss value: 5.000000E-01 |" in output.getvalue()
    assert "rewards/accuracies value: 7.500000E-01 |" in output.getvalue()
    assert "PPL" not in output.getvalue()
