"""Two hosts on this machine: network namespaces with names and addresses of their own, joined by one cable."""

import contextlib
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from tests.support.daemons import skip_without
from tests.support.ranks import REPOSITORY

NAMES = ("node-a", "node-b")
ADDRESSES = ("10.123.7.1", "10.123.7.2")
LIFETIME_S = 600
"""Limit on the life of a process on a host, whatever becomes of the tests."""
_MADE = itertools.count()


class Node:
    """A program started on one host."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self._process, self.log = process, log
        self._begun, self._ended = time.monotonic(), math.inf
        self._waiting = threading.Thread(target=self._wait, daemon=True)
        self._waiting.start()

    def _wait(self) -> None:
        self._process.wait()
        self._ended = time.monotonic()

    def lifetime_s(self) -> float:
        """Seconds from its start to its end."""
        return self._ended - self._begun

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def sentences(self) -> list[str]:
        """The lines that the command itself wrote to standard error."""
        return [line for line in self.text().splitlines() if line.startswith("hft-megatron: ")]

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def code(self, *, within: float) -> int:
        """The exit code, after at most ``within`` seconds."""
        self._waiting.join(within)
        assert not self._waiting.is_alive(), f"has not ended in {within:g} s:\n{self.text()[-6000:]}"
        return int(self._process.returncode)

    def ranks(self) -> dict[int, psutil.Process]:
        """The living ranks by number."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error, KeyError):
                    if "hft_megatron" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                        found[int(child.environ()["RANK"])] = child
        return found


class TwoHosts:
    """Two hosts. ``close`` ends all their processes and removes them."""

    def __init__(self) -> None:
        skip_without("ip", "unshare", "timeout")
        _remove_what_dead_tests_left()
        number = next(_MADE)
        self._spaces = tuple(f"hft-{os.getpid()}-{number}-{name}" for name in NAMES)
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        probe = subprocess.run(["ip", "netns", "add", self._spaces[0]], capture_output=True, text=True, timeout=20)
        if probe.returncode != 0:
            pytest.skip(f"network namespaces cannot be made here: {probe.stderr.strip()}")
        _ip("netns", "add", self._spaces[1])
        ends = [("name", "eth0", "netns", space) for space in self._spaces]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        table = "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True))
        for space, address in zip(self._spaces, ADDRESSES, strict=True):
            _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", space, "link", "set", device, "up")
            folder = _settings_of(space)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(table)

    def start(self, host: int, words: Sequence[str], *, log: Path, settings: Mapping[str, str]) -> Node:
        """Starts a command on a host as a person there would."""
        removed = ("RANK", "WORLD_SIZE", "PYTHON", "PYTHONPATH", "OMP_NUM_THREADS")
        environment = {name: value for name, value in os.environ.items() if name not in removed}
        environment |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "eth0"}
        enter = ["ip", "netns", "exec", self._spaces[host], "unshare", "--uts", "--", "bash", "-c"]
        named = ['hostname "$0" && exec "$@"', NAMES[host], "timeout", "--kill-after=5", str(LIFETIME_S)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*enter, *named, *words],
                cwd=REPOSITORY,
                env={**environment, **settings},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return Node(process, log)

    def cut(self) -> None:
        """Pulls the cable out."""
        _ip("-n", self._spaces[1], "link", "set", "eth0", "down")

    def mend(self) -> None:
        """Puts the cable in again; does nothing where it is in."""
        _ip("-n", self._spaces[1], "link", "set", "eth0", "up")

    def end_all(self) -> None:
        """Kills whatever runs on the hosts."""
        for space in self._spaces:
            _kill_all_in(space)

    def close(self) -> None:
        for space in self._spaces:
            _remove(space)


def wait_for(ready: Callable[[], bool], nodes: Sequence[Node], seconds: float) -> None:
    """Waits until ``ready``; the nodes must run that long."""
    deadline = time.monotonic() + seconds
    while not ready():
        said = "\n".join(f"--- {node.log.name}\n{node.text()[-4000:]}" for node in nodes)
        assert all(node.is_running for node in nodes), f"has ended:\n{said}"
        assert time.monotonic() < deadline, f"waited {seconds:g} s:\n{said}"
        time.sleep(0.05)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


def _settings_of(space: str) -> Path:
    """Folder whose files ``ip netns exec`` puts in the place of those in /etc."""
    return Path("/etc/netns") / space


def _kill_all_in(space: str) -> None:
    deadline = time.monotonic() + 20
    while (found := _ip("netns", "pids", space).split()) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)


def _remove(space: str) -> None:
    if space in _spaces():
        _kill_all_in(space)
        _ip("netns", "delete", space)
    shutil.rmtree(_settings_of(space), ignore_errors=True)


def _spaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line]


def _remove_what_dead_tests_left() -> None:
    for space in _spaces():
        prefix, _, rest = space.partition("-")
        pid = rest.partition("-")[0]
        if prefix == "hft" and pid.isdecimal() and not psutil.pid_exists(int(pid)):
            _remove(space)
