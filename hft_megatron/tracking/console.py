"""Output for people: Megatron's log lines, and a progress bar on a terminal."""

import math
import os
import sys
from datetime import datetime, timedelta
from typing import ClassVar, TextIO

from hft_megatron.tracking.tracker import (
    ACTUAL_THROUGHPUT,
    ALL_GATHER_WAIT,
    BACKWARD_TIME,
    CONSUMED_SAMPLES,
    DECOUPLED_LEARNING_RATE,
    DEVICE_PEAK,
    EWC_PENALTY,
    FASTEST,
    FORWARD_TIME,
    GLOBAL_BATCH_SIZE,
    GRAD_NORM,
    ITERATION_TIME,
    KL_TO_BASE,
    LEARNING_RATE,
    LOSS,
    LOSS_SCALE,
    LOSS_SPIKE,
    NAN_ITERATIONS,
    NUM_ZEROS,
    OBJECTIVE_LOSS,
    OF_TASKS,
    OF_VALIDATION,
    OPTIMIZER_TIME,
    PARAMS_NORM,
    PREFERENCE_LOSS,
    PROCESS_PEAK,
    REDUCE_SCATTER_WAIT,
    REWARD_ACCURACY,
    REWARD_MARGIN,
    ROUND,
    ROUND_SWITCH_TIME,
    SKIPPED_ITERATIONS,
    SLOWEST,
    SLOWEST_RANK,
    THROUGHPUT,
    TIME_LEFT,
    TOKENS_PER_SECOND,
    Metrics,
    over_ranks,
)

_FIELDS: tuple[tuple[str, str], ...] = (
    (CONSUMED_SAMPLES, "12d"),
    (ITERATION_TIME, ".1f"),
    (THROUGHPUT, ".1f"),
    (LEARNING_RATE, ".6E"),
    (DECOUPLED_LEARNING_RATE, ".6E"),
    (GLOBAL_BATCH_SIZE, "5d"),
    (LOSS, ".6E"),
    (OBJECTIVE_LOSS, ".6E"),
    (KL_TO_BASE, ".6E"),
    (PREFERENCE_LOSS, ".6E"),
    (REWARD_ACCURACY, ".3f"),
    (REWARD_MARGIN, ".4f"),
    (LOSS_SCALE, ".1f"),
    (GRAD_NORM, ".3f"),
    (NUM_ZEROS, "d"),
    (PARAMS_NORM, ".3f"),
    (SKIPPED_ITERATIONS, "3d"),
    (NAN_ITERATIONS, "3d"),
    (LOSS_SPIKE, ".1f"),
    (EWC_PENALTY, ".6E"),
    (ROUND, "d"),
    (ROUND_SWITCH_TIME, ".1f"),
    (TOKENS_PER_SECOND, ".1f"),
    (ACTUAL_THROUGHPUT, ".1f"),
    (SLOWEST_RANK, "s"),
    (DEVICE_PEAK, ".2f"),
    (PROCESS_PEAK, ".2f"),
)
"""The log line's fields in Megatron's order and Megatron's formats, then ours; people grep and parse these lines.

A round's plan, with its counts and its digest, has lines of its own where the round begins.
"""
_ALWAYS: Metrics = {LOSS_SCALE: 1.0, SKIPPED_ITERATIONS: 0, NAN_ITERATIONS: 0}
"""Values of fields that Megatron's line always has and its parsers expect, where they are not measured: no loss is
scaled, and without --skip-nonfinite-steps the run ends where a step cannot be taken."""
_TIMERS = (
    ("all-grads-sync", REDUCE_SCATTER_WAIT),
    ("params-all-gather", ALL_GATHER_WAIT),
    ("optimizer", OPTIMIZER_TIME),
    ("forward-compute", FORWARD_TIME),
    ("backward-compute", BACKWARD_TIME),
)
"""Megatron's timers and their metrics, in its order."""
_BAR_FORMAT = "{n_fmt}/{total_fmt}|{bar}| {remaining} left{postfix}"
_BAR_FIELDS = (
    (LOSS, "loss {:.4f}"),
    (PREFERENCE_LOSS, "loss {:.4f}"),
    (LEARNING_RATE, "lr {:.2e}"),
    (GRAD_NORM, "norm {:.3g}"),
    (TOKENS_PER_SECOND, "{:,.0f} tok/s/GPU"),
)
"""Fields of the bar, short enough for 80 columns, hours left included; a narrower terminal cuts off the last."""

_LARGEST_EXPONENT = 20.0
"""Megatron's bound on the loss in a perplexity."""


def iteration_line(step: int, train_iters: int, metrics: Metrics, *, now: datetime) -> str:
    """Megatron's line of one iteration, with the measured fields; other metrics are not on it.

    It ends with the time left in hours, minutes and seconds.
    """
    shown = {**_ALWAYS, **metrics}
    fields = "".join(f" {name}: {shown[name]:{form}} |" for name, form in _FIELDS if name in shown)
    if TIME_LEFT in metrics:
        fields += f" time left: {timedelta(seconds=round(float(metrics[TIME_LEFT])))} |"
    return f" [{now:%Y-%m-%d %H:%M:%S.%f}] iteration {step:8d}/{train_iters:8d} |{fields}"


def timer_lines(metrics: Metrics) -> str:
    """Megatron's lines of the times of --timing-log-level over ranks; empty where none were measured.

    As in Megatron a timer that never ran has no line.
    """
    lines = []
    for timer, name in _TIMERS:
        low, high = (float(metrics.get(over_ranks(name, which), 0.0)) for which in (FASTEST, SLOWEST))
        if high > 0:
            lines.append(f"    {(timer + ' ').ljust(48, '.')}: ({low:.2f}, {high:.2f})")
    return "\n".join(["(min, max) time across ranks (ms):", *lines]) if lines else ""


def validation_line(step: int, metrics: Metrics) -> str:
    """Megatron's line of one validation, with all measured values; a loss in nats per token comes with its
    perplexity."""
    fields = []
    for name, value in metrics.items():
        plain, _, source = name.partition(OF_VALIDATION)
        shown = name if source else plain
        fields.append(f"{shown} value: {float(value):.6E}")
        if plain == LOSS:
            fields.append(f"{shown} PPL: {math.exp(min(_LARGEST_EXPONENT, float(value))):.6E}")
    return f" validation loss at iteration {step} | {' | '.join(fields)} | "


def tasks_line(step: int, metrics: Metrics) -> str:
    """One line of the values of tasks after an iteration."""
    values = (f"{name.removeprefix(OF_TASKS)}: {float(value):.4g}" for name, value in metrics.items())
    return f" tasks at iteration {step} | {' | '.join(values)} | "


def _columns(terminal: TextIO) -> int:
    try:
        return os.get_terminal_size(terminal.fileno()).columns
    except (OSError, ValueError):
        return 0


class ConsoleTracker:
    """Prints the lines to standard output, or shows a progress bar on standard error.

    The bar is shown when standard error is a terminal with a known width: a container's, for example, may report 0
    columns, where a bar would break over many lines. The lines are printed unless the bar is on the same screen (both
    are terminals), so that ``> train.log`` keeps them and the terminal is not flooded.
    """

    is_dashboard: ClassVar[bool] = False

    def __init__(
        self,
        *,
        train_iters: int,
        start_iteration: int,
        output: TextIO | None = None,
        progress: TextIO | None = None,
    ) -> None:
        """``output`` and ``progress`` default to standard output and standard error."""
        self._train_iters = train_iters
        self._output = output or sys.stdout
        progress = progress or sys.stderr
        self._bar = None
        if train_iters > 0 and progress.isatty() and _columns(progress) > 0:
            from tqdm import tqdm  # only on a terminal

            self._bar = tqdm(
                total=train_iters,
                initial=start_iteration,
                file=progress,
                dynamic_ncols=True,
                bar_format=_BAR_FORMAT,
            )
        self._prints_lines = self._bar is None or not self._output.isatty()

    def log(self, step: int, metrics: Metrics) -> None:
        """Print a training record, a validation or values of tasks, depending on the names in it."""
        if all(name.startswith(OF_TASKS) for name in metrics):
            self._print(tasks_line(step, metrics))
            return
        if all(OF_VALIDATION in name for name in metrics):
            line = validation_line(step, metrics)
            self._print(f"{'-' * len(line)}\n{line}\n{'-' * len(line)}")
            return
        if self._prints_lines:
            self._print(iteration_line(step, self._train_iters, metrics, now=datetime.now()))
            if timers := timer_lines(metrics):
                self._print(timers)
        if self._bar is not None:
            shown = [form.format(metrics[name]) for name, form in _BAR_FIELDS if name in metrics]
            self._bar.set_postfix_str(" ".join(shown), refresh=False)
            self._bar.update(step - self._bar.n)

    def _print(self, text: str) -> None:
        """Print above the bar, if there is one, and at once: a log that is piped must not lag."""
        if self._bar is not None:
            self._bar.clear()
        print(text, file=self._output, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
