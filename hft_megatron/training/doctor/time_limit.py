"""Nothing that hangs may hang the doctor: whatever does not return in time ends the process, with a word about it."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hft_megatron.errors import EXIT_FAILURE


@dataclass(frozen=True, kw_only=True)
class TimeLimit:
    """For calls into a driver, a network disk or a collective, which no exception reaches."""

    seconds: float
    on_expiry: Callable[[str], None]
    """Called on another thread with what did not return; the process ends after it, with ``EXIT_FAILURE``."""

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        """The time for what stands within."""
        expired = threading.Event()
        timer = threading.Timer(self.seconds, self._expire, (what, expired))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if expired.is_set():
                threading.Event().wait()  # The other thread is at its word, and ends the process.

    def _expire(self, what: str, expired: threading.Event) -> None:
        expired.set()
        try:
            self.on_expiry(what)
        finally:
            os._exit(EXIT_FAILURE)
