"""Daemons that tests start for a while: ended by process id, at the latest when the test process ends or time is up."""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

LIFETIME_S = 1500
"""Limit on a daemon's life, whatever becomes of the tests."""
_PR_SET_PDEATHSIG = 1


def skip_without(*programs: str) -> None:
    """Skips the test where system tests cannot run: not as root, or without one of ``programs``."""
    if os.geteuid() != 0:
        pytest.skip("system tests start daemons as root")
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}; .ci/install-system.sh installs what system tests need")


class Daemon:
    """A process that runs until ``end``."""

    def __init__(self, words: list[str], *, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        self._name = words[0]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["timeout", "--kill-after=10", str(LIFETIME_S), *words],
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def wait_for(self, ready: Callable[[], bool], seconds: float) -> None:
        """Waits until ``ready``; the daemon must live that long."""
        deadline = time.monotonic() + seconds
        while not ready():
            assert self._process.poll() is None, f"{self._name} has ended:\n{self.said()}"
            assert time.monotonic() < deadline, f"{self._name} is not ready after {seconds:g} s:\n{self.said()}"
            time.sleep(0.1)

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def end(self, seconds: float = 30) -> None:
        """SIGTERM, and SIGKILL to it and what it started in its session when that does not help."""
        self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
