"""Checks for the acceptance run's parent: they need no product, and do what real ones must never do."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

from working_site import Site, expect


def passes(site: Site) -> dict[str, Any]:
    return {"answer": 42}


def fails(site: Site) -> dict[str, Any]:
    expect(2 + 2 == 5, "two and two are five")
    return {}


def crashes(site: Site) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def hangs(site: Site) -> dict[str, Any]:
    """Starts a process in a session of its own, and waits for ever."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    unfinished = site.folder / "child.part"
    unfinished.write_text(str(child.pid))
    unfinished.rename(site.folder / "child")
    time.sleep(600)
    return {}
