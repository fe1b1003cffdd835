"""A check that hangs. Run: pytest tests/doctor/test_time_limit.py"""

import subprocess
import sys
import threading

import pytest

from hft_megatron.doctor.findings import TimeLimit
from hft_megatron.errors import EXIT_FAILURE

HANGS = """
import threading
from hft_megatron.doctor.findings import TimeLimit
limit = TimeLimit(seconds=0.2, on_expiry=lambda what: print(what, "did not return", flush=True))
with limit.of("disk"):
    threading.Event().wait()
"""


RETURNS_TOO_LATE = """
import time
from hft_megatron.doctor.findings import TimeLimit
def say(what):
    time.sleep(1)
    print(what, "did not return", flush=True)
with TimeLimit(seconds=0.2, on_expiry=say).of("disk"):
    time.sleep(0.7)
print("went on", flush=True)
"""


@pytest.mark.parametrize("script", [HANGS, RETURNS_TOO_LATE], ids=["for ever", "until its end is being announced"])
def test_what_hangs_is_said_and_ends_the_process(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (EXIT_FAILURE, "disk did not return\n")


def test_what_returns_in_time_is_left_alone() -> None:
    said: list[str] = []
    before = set(threading.enumerate())
    with TimeLimit(seconds=600.0, on_expiry=said.append).of("disk"):
        (timer,) = set(threading.enumerate()) - before
    timer.join(60)
    assert not timer.is_alive()
    assert said == []
