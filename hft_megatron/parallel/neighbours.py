"""Notices that another rank of this host has ended, and reports how, as far as a neighbour can know.

A collective whose partner has died fails with an error about a connection, or on a GPU waits for its time-out. The
kernel reports the end of a process at once to every holder of its descriptor (Linux 5.3 and newer), and its exit status
until the launcher collects it: about a tenth of a second under torchrun.
"""

import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hft_megatron.errors import EXIT_FAILURE, EXIT_USAGE, PeersLost

GRACE_KILLED_S, GRACE_ENDED_S = 1.0, 5.0
"""Delays before a thread reports a neighbour that a signal has killed, or that ended by itself: an error of this rank's
own work, which may be the same on all ranks and more specific, comes first."""
_PIDFD_OPEN = 434
"""Number of the system call on x86, Arm, POWER and s390."""


@dataclass(frozen=True)
class Process:
    """The process of a rank."""

    pid: int
    namespace: str
    """Process namespace; processes of the same one can see each other."""

    @staticmethod
    def own() -> "Process":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return Process(pid=os.getpid(), namespace=f"{boot} {os.stat('/proc/self/ns/pid').st_ino}")


class Neighbours:
    """The other ranks of this host, watched from ``start`` to ``stop``."""

    def __init__(
        self, rank: int, processes: Mapping[int, Process], host: str, end: Callable[[PeersLost], None]
    ) -> None:
        """``processes`` are those of all ranks. ``end`` is called on another thread and ends this process."""
        mine = processes[rank]
        self._rank, self._host, self._end = rank, host, end
        self._pids = {
            other: process.pid
            for other, process in processes.items()
            if other != rank and process.namespace == mine.namespace
        }
        self._descriptors: dict[int, int] = {}
        self._ended: dict[int, int | None] = {}
        """Exit status of neighbours that have ended, in the order of observation; None where it is unknown."""
        self._seen = threading.Event()
        self._lock = threading.Lock()
        self._over = self._ending = False
        self._wakes, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="neighbours", daemon=True)

    def start(self) -> None:
        """Begins to watch. Until another handler is set, a rank that gets SIGTERM, which torchrun sends to the
        remaining ranks, reports the one that ended."""
        if not self._pids:
            return
        for rank, pid in self._pids.items():
            try:
                self._descriptors[rank] = _descriptor_of(pid)
            except ProcessLookupError:
                self._note(rank, None)
            except OSError:  # an older kernel, or one that forbids it
                continue
        self._thread.start()
        self._change_sigterm(signal.SIG_DFL, self._on_sigterm)

    def stop(self) -> None:
        """Ends the watch, because this rank ends by itself. Does not return if the watch is already ending it."""
        with self._lock:
            self._over, ending = True, self._ending
        if ending:
            threading.Event().wait()
        os.write(self._wake, b".")
        self._change_sigterm(self._on_sigterm, signal.SIG_DFL)

    def loss(self, wait_s: float) -> PeersLost | None:
        """The error about the first neighbour that has ended, or ends within ``wait_s``; None where none does.

        The caller reports it, and the watch is over. Does not return if the watch's thread is already reporting it and
        will exit the process.
        """
        if not self._seen.wait(wait_s):
            return None
        self.stop()
        self._look(0.0)
        return self._in_words()

    def _in_words(self) -> PeersLost:
        # The launcher ends the remaining ranks, and errors follow a death: take a signal first, then the earliest.
        rank, status = min(self._ended.items(), key=lambda one: not _is_killed(one[1]))
        # Others that have ended by themselves have reported it.
        silent = {rank, *(other for other, status in self._ended.items() if _is_killed(status))}
        speaker = min({self._rank, *self._pids} - silent)
        place = f"rank {rank} on {self._host} (process {self._pids[rank]})"
        return PeersLost(f"{place} {_how(status)}", speaks=self._rank == speaker and not _has_spoken(status))

    def _change_sigterm(self, old: Any, new: Any) -> None:
        """Sets a handler of SIGTERM in place of ``old``; another one, such as training's own, is kept."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == old:
            signal.signal(signal.SIGTERM, new)

    def _on_sigterm(self, number: int, frame: object) -> None:
        self._look(0.0)
        # Where the launcher itself is stopped, neighbours may have gone by its signal already.
        if any(status is not None and not _is_stopped(status) for status in self._ended.values()):
            raise self._in_words()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over and not self._ended:
            self._look(None)
        if self._over:
            return
        killed = any(map(_is_killed, self._ended.values()))
        deadline = time.monotonic() + (GRACE_KILLED_S if killed else GRACE_ENDED_S)
        while not self._over and time.monotonic() < deadline:
            time.sleep(0.02)
        with self._lock:
            if self._over:
                return
            self._over = self._ending = True
        self._look(0.0)
        self._end(self._in_words())

    def _look(self, wait_s: float | None) -> None:
        """Notes the neighbours that have ended, or waits for one, or for ``stop``."""
        poll = select.poll()
        for descriptor in (self._wakes, *self._descriptors.values()):
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(None if wait_s is None else 1e3 * wait_s)}
        for rank, descriptor in list(self._descriptors.items()):
            if descriptor in ready and rank not in self._ended:
                self._note(rank, _exit_status(self._pids[rank]))

    def _note(self, rank: int, status: int | None) -> None:
        self._ended.setdefault(rank, status)
        self._seen.set()


def _descriptor_of(pid: int) -> int:
    """A file descriptor that reports the end of process ``pid``; OSError where there is none.

    ``os.pidfd_open`` is missing where Python was built with an old C library's headers, as conda's is.
    """
    if hasattr(os, "pidfd_open"):
        return os.pidfd_open(pid)
    descriptor: int = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_OPEN, pid, 0)
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return descriptor


def _exit_status(pid: int) -> int | None:
    """Exit status as ``os.waitpid`` gives it to the launcher; None where the launcher has collected it, or this process
    may not read it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    # Field 52 of proc(5); the first behind the name is the third. Users other than the owner also read 0.
    return (int(fields[49]) or None) if fields[0] == "Z" else None


def _is_killed(status: int | None) -> bool:
    """Return whether a signal other than the launcher's own killed the process."""
    return status is not None and os.WIFSIGNALED(status) and not _is_stopped(status)


def _is_stopped(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


def _has_spoken(status: int | None) -> bool:
    """Return whether the command itself ended the process, with a sentence or a traceback."""
    return status is not None and os.WIFEXITED(status) and os.WEXITSTATUS(status) in (EXIT_FAILURE, EXIT_USAGE)


def _how(status: int | None) -> str:
    if status is None:
        return "has ended; see the launcher's log for the reason"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        killer = "; the kernel does this when memory runs out, in which case dmesg shows it" if number == 9 else ""
        return f"was killed by signal {number} ({signal.Signals(number).name}){killer}"
    return f"ended with exit code {os.WEXITSTATUS(status)}; its output is in the log of its host"
