"""Tells a person how far the preprocessing is: a bar on a terminal, lines in a log."""

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


class ProgressReport:
    """Documents per second and the time left, by the bytes of input that are done."""

    def __init__(
        self, *, total: int, position: int, documents: int, log_interval: int, announce: Callable[[str], None]
    ) -> None:
        """``position`` of ``total`` bytes of input and so many documents are done already.

        Without a terminal a line is due every ``log_interval`` documents.
        """
        self._total = total
        self._first_position, self._first_documents = position, documents
        self._interval = log_interval
        self._next_line = documents + log_interval
        self._announce = announce
        self._bar: Any = None
        self._begin = time.monotonic()

    def update(self, position: int, documents: int) -> None:
        """So much is done now."""
        seconds = max(time.monotonic() - self._begin, 1e-9)
        rate = (documents - self._first_documents) / seconds
        said = f"{documents:,} documents, {rate:,.0f} documents/s"
        if sys.stderr.isatty():
            # Not before the first documents: the bar starts a thread, and workers are forked by then.
            if self._bar is None:
                form = "{percentage:3.0f}%|{bar}|{postfix}, {elapsed} gone, {remaining} left"
                self._bar = tqdm(total=self._total, initial=self._first_position, bar_format=form)
                self._bar.start_t -= seconds
            self._bar.set_postfix_str(said, refresh=False)
            self._bar.update(position - self._bar.n)
        elif documents >= self._next_line:
            left = (self._total - position) * seconds / max(position - self._first_position, 1)
            self._announce(f"{said}, {position / self._total:.1%} of the input, {_clock(left)} left")
            self._next_line = documents + self._interval

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
