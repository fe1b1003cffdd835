"""What a person sees: Megatron's log lines, and a progress bar when someone watches."""

import math
import sys
from datetime import datetime
from typing import TextIO

from hft_megatron.tracking.tracker import (
    CONSUMED_SAMPLES,
    FROZEN_PARAMETERS,
    GLOBAL_BATCH_SIZE,
    GRAD_NORM,
    ITERATION_TIME,
    LEARNING_RATE,
    LOSS,
    PLAN_DIGEST,
    ROUND,
    ROUND_SWITCH_TIME,
    TRAINABLE_PARAMETERS,
    VALIDATION_LOSS,
    Metrics,
)

_FIELDS: tuple[tuple[str, str], ...] = (
    (CONSUMED_SAMPLES, "12d"),
    (ITERATION_TIME, ".1f"),
    ("throughput per GPU (TFLOP/s/GPU)", ".1f"),
    (LEARNING_RATE, ".6E"),
    (GLOBAL_BATCH_SIZE, "5d"),
    (LOSS, ".6E"),
    ("loss scale", ".1f"),
    (GRAD_NORM, ".3f"),
    ("num zeros", "d"),
    ("params norm", ".3f"),
    ("number of skipped iterations", "3d"),
    ("number of nan iterations", "3d"),
    (ROUND, "d"),
    (TRAINABLE_PARAMETERS, "d"),
    (FROZEN_PARAMETERS, "d"),
    (PLAN_DIGEST, "s"),
    (ROUND_SWITCH_TIME, ".1f"),
)
"""The log line's fields in Megatron's order and Megatron's formats, then ours; people grep and parse these lines."""

_LARGEST_EXPONENT = 20.0
"""Megatron's bound on the loss in a perplexity."""


def iteration_line(step: int, train_iters: int, metrics: Metrics, *, now: datetime) -> str:
    """Megatron's line of one iteration, with the fields that were measured; other metrics are not on it."""
    fields = "".join(f" {name}: {metrics[name]:{form}} |" for name, form in _FIELDS if name in metrics)
    return f" [{now:%Y-%m-%d %H:%M:%S.%f}] iteration {step:8d}/{train_iters:8d} |{fields}"


def validation_line(step: int, loss: float) -> str:
    """Megatron's line of one validation; ``loss`` is in nats per token."""
    perplexity = math.exp(min(_LARGEST_EXPONENT, loss))
    return f" validation loss at iteration {step} | {LOSS} value: {loss:.6E} | {LOSS} PPL: {perplexity:.6E} | "


class ConsoleTracker:
    """Prints the lines to standard output, or shows a progress bar on standard error.

    The bar is shown when standard error is a terminal. The lines are printed unless the bar stands on the same
    screen (both are terminals), so that ``> train.log`` keeps them and a person is not flooded.
    """

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
        if progress.isatty():
            from tqdm import tqdm  # only when a person watches

            self._bar = tqdm(total=train_iters, initial=start_iteration, file=progress, unit="it", dynamic_ncols=True)
        self._prints_lines = self._bar is None or not self._output.isatty()

    def log(self, step: int, metrics: Metrics) -> None:
        """Print a training record or a validation, told apart by the key of the loss."""
        if VALIDATION_LOSS in metrics:
            line = validation_line(step, float(metrics[VALIDATION_LOSS]))
            self._print(f"{'-' * len(line)}\n{line}\n{'-' * len(line)}")
            return
        if self._prints_lines:
            self._print(iteration_line(step, self._train_iters, metrics, now=datetime.now()))
        if self._bar is not None:
            if LOSS in metrics:
                self._bar.set_postfix_str(f"{LOSS} {metrics[LOSS]:.4f}", refresh=False)
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
