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
        timer = threading.Timer(self.seconds, self._expire, (what,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _expire(self, what: str) -> None:
        try:
            self.on_expiry(what)
        finally:
            os._exit(EXIT_FAILURE)
