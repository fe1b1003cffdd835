"""Groups of real gloo ranks for tests: started once per world size under torchrun, kept for the whole session.

A test's body is a module-level function ``run_x(**kwargs)`` that every rank executes; the test launches it with
``ranks(world_size).run(run_x, ...)`` and looks at what each rank returned.
"""

import contextlib
import inspect
import json
import selectors
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.support.forked import REPOSITORY, Started, start, torchrun

WORKER = Path(__file__).with_name("worker.py")
START_TIMEOUT = 180.0
# Once one rank has failed, the others either answer at once or wait for it in a collective for ever.
GRACE_AFTER_FAILURE = 3.0
STACK_DUMP_TIMEOUT = 10.0

FORGET = {"forget": "the last case"}
"""The command, without an answer, that ranks get when all of them have answered."""

Target = str | Callable[..., Any]


class RanksFailed(AssertionError):
    """A case failed: ``tracebacks`` of the ranks that raised, ``stacks`` of the ranks that were stuck."""

    def __init__(self, title: str, tracebacks: dict[int, str], stacks: dict[int, str], output: str) -> None:
        self.tracebacks = tracebacks
        self.stacks = stacks
        parts = [title]
        parts += [f"--- rank {rank} raised\n{text}" for rank, text in sorted(tracebacks.items())]
        parts += [f"--- rank {rank} was stuck here\n{text}" for rank, text in sorted(stacks.items())]
        parts.append(f"--- last output of the group\n{output}")
        super().__init__("\n".join(parts))


class _Rank:
    """The launcher's end of one rank's socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffer = b""
        self.process: psutil.Process | None = None

    def send(self, message: dict[str, Any]) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """One message, or None when its line is not complete yet. Raises EOFError when the rank is gone."""
        try:
            chunk = self.connection.recv(1 << 20)
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            raise EOFError
        self.buffer += chunk
        if b"\n" not in self.buffer:
            return None
        line, _, self.buffer = self.buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


class RankPool:
    """``world_size`` ranks, started by the first ``run`` and restarted by the first one after a failure."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._ranks: list[_Rank] = []
        self._torchrun: Started | None = None
        self._folder = Path()

    def run(self, target: Target, *, timeout: float = 300.0, **kwargs: Any) -> list[Any]:
        """Call ``target(**kwargs)`` on every rank and return the values in rank order.

        ``target`` is a module-level function or ``"tests.part.cases:run_x"``; arguments and values travel as JSON, so
        tuples come back as lists and keys as strings. ``timeout`` is in seconds and does not count the start of the
        ranks. Raises RanksFailed with the traceback of every rank that raised and the stack of every rank that hung;
        after that the group is ended, because ranks that failed may disagree about which collective comes next.
        """
        if not self._ranks:
            self._start()
        log_start = self._log.stat().st_size
        command = {"target": _name_of(target), "kwargs": kwargs}
        self._send(command)
        values, tracebacks = self._collect(timeout)
        silent = [rank for rank in range(self.world_size) if rank not in values and rank not in tracebacks]
        output = self._output(log_start)
        print(output, end="")
        if not tracebacks and not silent:
            self._send(FORGET)
            return [values[rank] for rank in range(self.world_size)]
        stacks = self._stacks(silent)
        self.close()
        title = f"{command['target']} failed on ranks {sorted(tracebacks)} of {self.world_size}"
        if not tracebacks:
            title = f"{command['target']} did not finish in {timeout:g} s on ranks {silent} of {self.world_size}"
        raise RanksFailed(title, tracebacks, stacks, _tail(output))

    def _send(self, command: dict[str, Any]) -> None:
        """Sends to all ranks. Raises RanksFailed, and ends the group, where one of them is gone."""
        try:
            for rank in self._ranks:
                rank.send(command)
        except OSError:
            output = self._output(0)
            self.close()
            raise RanksFailed(f"a rank of {self.world_size} died after its answer", {}, {}, _tail(output)) from None

    def close(self) -> None:
        """Kill the group: torchrun would give stuck ranks 30 seconds, and each rank has a session of its own."""
        if self._torchrun is None:
            return
        family = {rank.process for rank in self._ranks if rank.process is not None}
        with contextlib.suppress(psutil.NoSuchProcess):  # Where it did not start, its end was seen.
            launcher = psutil.Process(self._torchrun.pid)
            family |= {*launcher.children(recursive=True), launcher}
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._torchrun.wait()
        for rank in self._ranks:
            rank.connection.close()
        self._ranks, self._torchrun = [], None
        shutil.rmtree(self._folder)

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    def _output(self, start: int) -> str:
        with self._log.open("rb") as log:
            log.seek(start)
            return log.read().decode(errors="replace")

    def _start(self) -> None:
        # A unix socket's path holds about 100 bytes, so not pytest's deep temporary folders.
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        socket_path = str(self._folder / "s")
        self._log.touch()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(socket_path)
            listener.listen(self.world_size)
            listener.settimeout(0.2)
            self._torchrun = start([*torchrun(self.world_size), str(WORKER), socket_path], output=self._log)
            try:
                self._ranks = self._accept(listener)
            except BaseException:
                self.close()
                raise

    def _accept(self, listener: socket.socket) -> list[_Rank]:
        assert self._torchrun is not None
        found: dict[int, _Rank] = {}
        begun = time.monotonic()
        while len(found) < self.world_size:
            if self._torchrun.poll() is not None or time.monotonic() > begun + START_TIMEOUT:
                self._abort()
                raise RanksFailed(f"{self.world_size} ranks did not start", {}, {}, self._output(0))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            connection.setblocking(True)
            rank = _Rank(connection)
            while (hello := rank.receive()) is None:
                pass
            rank.process = psutil.Process(hello["pid"])
            found[hello["rank"]] = rank
        return [found[rank] for rank in range(self.world_size)]

    def _abort(self) -> None:
        """Make torchrun and every rank that it has started write the stacks of their threads, and end."""
        assert self._torchrun is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self._torchrun.pid)
            # torchrun first: it ends what it has started when one of them ends.
            for process in (launcher, *launcher.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGABRT)
                    deadline = time.monotonic() + STACK_DUMP_TIMEOUT
                    while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
                        time.sleep(0.05)

    def _collect(self, timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
        """Values and tracebacks by rank; a rank in neither was stuck until the time-out or the grace ran out."""
        values: dict[int, Any] = {}
        tracebacks: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for number, rank in enumerate(self._ranks):
                selector.register(rank.connection, selectors.EVENT_READ, number)
            while selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    number = key.data
                    try:
                        message = self._ranks[number].receive()
                    except EOFError:
                        message = {"traceback": "the process died without a Python exception; see the output below\n"}
                    if message is None:
                        continue
                    selector.unregister(key.fileobj)
                    if "traceback" in message:
                        tracebacks[number] = message["traceback"]
                        deadline = min(deadline, time.monotonic() + GRACE_AFTER_FAILURE)
                    else:
                        values[number] = message["value"]
        return values, tracebacks

    def _stacks(self, numbers: list[int]) -> dict[int, str]:
        for number in numbers:
            process = self._ranks[number].process
            assert process is not None
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGUSR1)
        files = {number: self._folder / f"s.stacks-{number}" for number in numbers}
        deadline = time.monotonic() + STACK_DUMP_TIMEOUT
        while time.monotonic() < deadline and not all(_is_complete(file) for file in files.values()):
            time.sleep(0.1)
        return {number: file.read_text() for number, file in files.items()}


class RankPools:
    """One pool per world size. Call with a world size; ``close`` ends them all."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def __call__(self, world_size: int) -> RankPool:
        return self._pools.setdefault(world_size, RankPool(world_size))

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def _name_of(target: Target) -> str:
    """``module:function`` as the ranks import it: from the repository's root, whatever pytest calls the module."""
    if isinstance(target, str):
        return target
    source = Path(inspect.getfile(target)).resolve().relative_to(REPOSITORY)
    assert "." not in target.__qualname__, f"{target.__qualname__} must be a module-level function"
    return f"{'.'.join(source.with_suffix('').parts)}:{target.__qualname__}"


def _is_complete(stacks: Path) -> bool:
    # faulthandler writes the main thread last and the outermost call at the end.
    return 'worker.py", line' in stacks.read_text().rsplit("Current thread", 1)[-1]


def _tail(text: str, lines: int = 40) -> str:
    return "\n".join(text.splitlines()[-lines:])
