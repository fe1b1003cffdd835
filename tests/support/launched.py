"""A run of ``hft-megatron sft`` under torchrun, seen from outside: its ranks, their writers, and its end."""

import contextlib
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

from tests.support.forked import RANK_NAME
from tests.support.runs import start_cli

Found = TypeVar("Found")
START_TIMEOUT = 180.0


class Launched:
    """A launched run."""

    def __init__(self, words: Sequence[str], *, ranks: int | None, log: Path, mounts_of: int | None) -> None:
        self.log = log
        self._process = start_cli(words, ranks=ranks, log=log, mounts_of=mounts_of)
        self.launcher = psutil.Process(self._process.pid)
        self._ranks: dict[int, psutil.Process] = {}

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank, which must be there or have been."""
        if number not in self._ranks:
            for child in self.launcher.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if child.name() == RANK_NAME.format(number):
                        self._ranks[number] = child
        assert number in self._ranks, f"there is no rank {number}:\n{self.said()}"
        return self._ranks[number]

    def writer(self, number: int) -> psutil.Process | None:
        """The process that writes a rank's checkpoint in the background, while there is one."""
        pid = self.rank(number).pid
        # psutil looks through all processes, which takes longer than a save.
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert len(children) <= 1
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(int(children[0])) if children else None
        return None

    def wait_for(self, what: Callable[[], Found | None], seconds: float = START_TIMEOUT) -> Found:
        """The value of ``what`` once it is true; the run must live that long."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert self._process.poll() is None, f"the run has ended:\n{self.said()}"
            assert time.monotonic() < deadline, f"waited {seconds:g} s:\n{self.said()}"
            time.sleep(0.002)
        return found

    def freeze(self, *processes: psutil.Process) -> bool:
        """Stops processes where they are, and returns when they have stopped; False where one has ended instead."""
        try:
            for process in processes:
                process.suspend()
            still = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
            self.wait_for(lambda: all(process.status() in still for process in processes))
            return all(process.status() == psutil.STATUS_STOPPED for process in processes)
        except psutil.NoSuchProcess:
            return False

    def resume(self, *processes: psutil.Process) -> None:
        """Resumes frozen processes."""
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def end(self, *, within: float) -> tuple[int, float]:
        """Waits until torchrun and all its processes are gone; its exit code and the seconds it took."""
        begun = time.monotonic()
        family = [member for member in self._family() if member != self.launcher]
        try:
            code = self._process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end in {within:g} s:\n{self.said()}") from None
        _, alive = psutil.wait_procs(family, timeout=max(0.0, within - (time.monotonic() - begun)))
        took = time.monotonic() - begun
        assert not alive, f"{alive} live on after {took:.1f} s:\n{self.said()}"
        return code, took

    def kill(self) -> None:
        """Kills all remaining processes; torchrun gives each rank a session of its own."""
        for member in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self._process.wait()

    def _family(self) -> list[psutil.Process]:
        try:
            return [*self.launcher.children(recursive=True), self.launcher]
        except psutil.NoSuchProcess:
            return []

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def said(self) -> str:
        """The end of ``text`` without the lines of iterations."""
        lines = [line for line in self.text().splitlines() if not line.startswith((" [", "saving", "  success"))]
        return "\n".join(lines[-60:])

    def sentences(self) -> list[str]:
        """The lines that the command itself wrote to standard error."""
        return [line for line in self.text().splitlines() if line.startswith("hft-megatron: ")]

    def exit_codes(self) -> dict[int, int]:
        """Exit codes of the ranks that torchrun saw fail; it doesn't report those that a signal to itself has ended."""
        found = re.findall(r"^ +rank +: (\d+) .*\n +exitcode +: (-?\d+)", self.text(), re.MULTILINE)
        return {int(rank): int(code) for rank, code in found}


@contextlib.contextmanager
def launched(
    words: Sequence[str], *, ranks: int | None = 2, log: Path, mounts_of: int | None = None
) -> Iterator[Launched]:
    """Starts a run, on the file systems of the process ``mounts_of``, and leaves nothing behind."""
    run = Launched(words, ranks=ranks, log=log, mounts_of=mounts_of)
    try:
        yield run
    finally:
        run.kill()
