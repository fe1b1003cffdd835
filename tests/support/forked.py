"""Python programs that start by fork from a process which has imported torch and megatron-core once.

Imports are 6 s of CPU for every rank that is really started, most of what a short run costs. ``start`` takes the words
of a ``python`` command and gives a process with an id, a session and an exit code of its own; a torchrun started
this way forks its ranks in turn. Two things differ from a real start: all share one seed of hashes, and a process
ends without the interpreter's last clean-up. test_forked.py compares such a run with one that is really started.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import io
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, process, resource_tracker
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Ranks of other tests would crowd on one card; `HFT_TEST_CUDA=1 pytest -m gpu` runs those that need it.
    **({} if os.environ.get("HFT_TEST_CUDA") == "1" else {"CUDA_VISIBLE_DEVICES": ""}),
    # After it what stood there: another line of megatron-core than the one that is installed, for one.
    "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
}
"""Environment of a started program; libraries have read these when they were imported, all except the last."""
RANK_NAME = "rank {}"
"""The name of a forked rank in the process table, which shows the server's environment."""
_PR_SET_NAME, _CLONE_NEWNS, _CLONE_NEWUSER = 15, 0x00020000, 0x10000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preloaded"])


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without what a torchrun around it would have set, and with ``ENVIRONMENT``."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return kept | ENVIRONMENT | changes


def torchrun(ranks: int) -> list[str]:
    """Words for ``start`` before those of a program that runs on ``ranks`` ranks of this machine."""
    # Not --standalone: it resolves this machine's own name, which containers without a network cannot.
    words = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", "localhost:0", "--local-addr", "localhost"]
    return [*words, "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]


class Started:
    """A running program, with those methods of ``subprocess.Popen`` that tests use."""

    def __init__(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        output: Path,
        errors: Path | None,
        mounts_of: int | None,
    ) -> None:
        self.args = list(words)
        arguments = (self.args, dict(environment), str(output), str(errors or output), mounts_of)
        self._process = _CONTEXT.Process(target=_run_in_server_s_child, args=arguments)
        self._process.start()
        # A command that fails in this process kills the children that it finds here, which are not its own.
        process._children.discard(self._process)  # type: ignore[attr-defined]
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; minus the number of the signal that ended it. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


def start(
    words: Sequence[str],
    *,
    output: Path,
    errors: Path | None = None,
    environment: Mapping[str, str] | None = None,
    mounts_of: int | None = None,
) -> Started:
    """Starts ``python WORDS`` (``-m MODULE ...`` or ``FILE ...``) in the repository, in a session of its own.

    Both streams go to the file ``output``, or standard error to ``errors``; standard input is empty. The program sees
    the file systems that the process ``mounts_of`` sees.
    """
    _ensure_server()
    return Started(words, clean_environment() if environment is None else environment, output, errors, mounts_of)


def kill_all(started: Started) -> None:
    """torchrun gives each worker a session of its own, so killing the launcher's group would leave them running."""
    launcher = psutil.Process(started.pid)
    family = [*launcher.children(recursive=True), launcher]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=10)


def await_server() -> None:
    """Waits until the process that others are forked from has imported everything: a fixture's time, not a test's."""
    _ensure_server()
    first = _CONTEXT.Process(target=os.getpid)
    first.start()
    first.join()


def _ensure_server() -> None:
    with patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()


def run(
    words: Sequence[str], folder: Path, *, timeout: float = 120, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """``start`` and wait; what it said goes through files in ``folder``. A program that takes longer is killed."""
    output, errors = folder / "program-output", folder / "program-errors"
    process = start(words, output=output, errors=errors, environment=environment)
    try:
        code = process.wait(timeout)
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return subprocess.CompletedProcess(list(words), code, output.read_text(), errors.read_text())


def _run_in_server_s_child(
    words: list[str], environment: dict[str, str], output: str, errors: str, mounts_of: int | None
) -> NoReturn:
    os.setsid()
    for path, streams in ((output, (1, 2) if errors == output else (1,)), (errors, () if errors == output else (2,))):
        if streams:
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            for stream in streams:
                os.dup2(opened, stream)
            os.close(opened)
    if mounts_of is not None:
        _enter_mounts(mounts_of)
    _become(words, environment, unbuffered=False)


def _enter_mounts(pid: int) -> None:
    """Does what ``nsenter --mount`` does; only root owns the namespace outside of the process's user namespace."""
    kinds = {"mnt": _CLONE_NEWNS} if os.geteuid() == 0 else {"user": _CLONE_NEWUSER, "mnt": _CLONE_NEWNS}
    namespaces = [(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY), flag) for kind, flag in kinds.items()]
    for opened, flag in namespaces:
        if _LIBC.setns(opened, flag) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        os.close(opened)


class _ForkedRank:
    """The methods of ``Popen`` that torchrun calls on a rank."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], streams: Mapping[int, Any]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            with _no_way_back():
                self._become_rank(words, environment, streams)

    @staticmethod
    def _become_rank(words: Sequence[str], environment: Mapping[str, str], streams: Mapping[int, Any]) -> NoReturn:
        # Nothing of torchrun's may be collected: its objects would close file descriptors that belong to other files by
        # then.
        gc.freeze()
        os.setsid()
        for number in range(1, signal.NSIG):
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream, file in streams.items():
            if file is not None:
                os.dup2(file.fileno(), stream)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        resource_tracker._resource_tracker._fd = None  # type: ignore[attr-defined]
        _LIBC.prctl(_PR_SET_NAME, RANK_NAME.format(environment["RANK"]).encode(), 0, 0, 0)
        _become(words, environment, unbuffered=True)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired([], timeout)
            time.sleep(0.01)
        return code


def _fork_rank(handler: Any, words: Sequence[str], environment: Mapping[str, str]) -> _ForkedRank:
    """Replaces the method with which torchrun starts a rank."""
    assert words[:2] == (sys.executable, "-u"), words
    return _ForkedRank(words[2:], environment, {1: handler._stdout, 2: handler._stderr})


def _become(words: Sequence[str], environment: Mapping[str, str], *, unbuffered: bool) -> NoReturn:
    """Runs a program as ``python WORDS`` would, and ends this process with its exit code."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    random.seed()
    for number, name in ((1, "stdout"), (2, "stderr")):
        raw = open(number, "wb", buffering=0, closefd=False)  # noqa: SIM115 (open as long as the process lives)
        binary: Any = raw if unbuffered else io.BufferedWriter(raw)
        stream = io.TextIOWrapper(binary, line_buffering=name == "stderr", write_through=unbuffered)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    faulthandler.enable()
    SubprocessHandler._popen = _fork_rank  # type: ignore[method-assign, assignment]
    code = _exit_code_of(lambda: _run(words))
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _run(words: Sequence[str]) -> None:
    if words[0] == "-m":
        sys.argv = list(words[1:])
        sys.path[0] = str(REPOSITORY)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def _exit_code_of(program: Callable[[], None]) -> int:
    """The interpreter's exit code for the program: 0, the code of SystemExit, minus a signal's number, or 1 with a
    trace."""
    try:
        program()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


@contextlib.contextmanager
def _no_way_back() -> Any:
    """Prevents a forked child from continuing in its parent's code, whatever happens."""
    try:
        yield
    finally:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
