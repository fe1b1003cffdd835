"""The edge of the process: turns a command's end into an exit code, a sentence and a status file.

The only ``except Exception`` of the package is here.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from hft_megatron import errors
from hft_megatron.config.run_folder import STATUS_FILE, write_atomically
from hft_megatron.parallel import launch

PROG = "hft-megatron"

OTHER_RANKS_WAIT_S = 30.0
"""Seconds for which a rank other than 0 holds back a user's mistake. Rank 0 nearly always has the same mistake: it
reports it, and torchrun ends the others meanwhile; imports alone can delay it for many seconds on a busy machine. A
rank that is still running then has a mistake of its own, such as a file that only its node lacks."""

SAME_STEP_S = 3.0
"""Seconds for which a rank other than 0 holds back a failure that may have ended all of them in the same step."""


class StatusFolder:
    """Folder for the outcome, for the script that started the ranks, since torchrun reports 1 for every failure.

    Unset until a command knows its --save folder. The file is written only into a folder that exists: a mistake
    in the options must not create the folder it names.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._found: tuple[int, int] | None = None

    def use(self, path: Path) -> None:
        """Writes go to ``path``. A file there now is of an earlier command, or of an earlier start by torchrun."""
        self._path = path
        self._found = self._version()

    def write(self, exit_code: int, state: str, message: str, *, is_consequence: bool = False) -> None:
        """Write ``status.json``; a folder that cannot be written must not hide the outcome itself.

        A mistake or failure that another rank has written since ``use`` is the cause and is kept; a mere consequence
        does not overwrite it.
        """
        if self._path is None or not self._path.is_dir() or (is_consequence and self._holds_new_cause()):
            return
        status = {"exit_code": exit_code, "state": state, "message": message}
        with contextlib.suppress(OSError):
            write_atomically(self._path / STATUS_FILE, json.dumps(status) + "\n")

    def _version(self) -> tuple[int, int] | None:
        assert self._path is not None
        try:
            file = (self._path / STATUS_FILE).stat()
        except OSError:
            return None
        return file.st_ino, file.st_mtime_ns

    def _holds_new_cause(self) -> bool:
        assert self._path is not None
        try:
            status = json.loads((self._path / STATUS_FILE).read_text(encoding="utf-8"))
            return status["state"] in ("usage", "failed") and self._version() != self._found
        except (OSError, ValueError, KeyError, TypeError):
            return False


def run_command(command: Callable[[StatusFolder], None]) -> int:
    """Run a command and return the exit code of the process; an error is reported once, by rank 0.

    A user's mistake and a stop by signal are one sentence. An internal failure is a traceback from every rank that
    fails, because the first one to fail is often not rank 0.
    """
    launch.forget_exit_code()
    with _sigterm_as_ctrl_c():
        return launch.leave_exit_code(_outcome(command))


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Within it, SIGTERM ends a process without ranks with a sentence, unless something else handles it.

    A rank, or the check before a start, ends at once: a rank may wait for others where Python cannot run handlers, and
    its launcher reports the signal.
    """
    if {"RANK", "WORLD_SIZE"} & os.environ.keys() or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Terminated(KeyboardInterrupt):
    """SIGTERM. Python would turn a plain KeyboardInterrupt inside ``exec``, as in many imports, into SIGINT."""


def _interrupt(number: int, frame: object) -> None:
    raise _Terminated


def _outcome(command: Callable[[StatusFolder], None]) -> int:
    status = StatusFolder()
    try:
        command(status)
    except errors.UserError as error:
        return _say_mistake(str(error), status)
    except errors.Stopped as stop:
        return _end(errors.EXIT_STOPPED, "stopped", str(stop), status)
    except errors.RunFailed as failure:
        _end_writers()
        return _end(errors.EXIT_FAILURE, "failed", f"error: {failure}", status)
    except errors.RankFailed as failure:
        _end_writers()
        return _say_failure(f"error: {failure}", status)
    except errors.PeersLost as loss:
        end_of_peers(status)(loss)
        if loss.speaks is None and launch.local_rank() != 0:
            # torchrun ends the ranks of a host with the first that leaves, and this one reports nothing.
            _let_others_speak(OTHER_RANKS_WAIT_S)
        return errors.EXIT_FAILURE
    except _Terminated:
        sentence = "stopped by SIGTERM before the end; run the same command again"
        return _end(errors.EXIT_STOPPED, "stopped", sentence, status)
    except KeyboardInterrupt:
        return _end(errors.EXIT_INTERRUPTED, "failed", "interrupted from the keyboard", status)
    except Exception as error:
        traceback.print_exc()
        _end_writers()
        if _is_first_rank():
            sentence = f"{type(error).__name__}: {error}"
            status.write(errors.EXIT_FAILURE, "failed", sentence, is_consequence=True)
        return errors.EXIT_FAILURE
    if _is_first_rank():
        status.write(errors.EXIT_OK, "finished", "")
    return errors.EXIT_OK


def end_of_peers(status: StatusFolder) -> Callable[[errors.PeersLost], None]:
    """Reports lost peers before the process ends, on one rank of every host."""

    def end(loss: errors.PeersLost) -> None:
        message = f"error: {loss}"
        speaks = launch.local_rank() == 0 if loss.speaks is None else loss.speaks
        if speaks:
            print(f"{PROG}: {message}", file=sys.stderr, flush=True)
        _end_writers()
        # Rank 0 may be the one that is lost.
        if _is_first_rank() or loss.speaks:
            status.write(errors.EXIT_FAILURE, "failed", message, is_consequence=True)

    return end


def show(text: str) -> None:
    """Print the result of a command."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # `| head` has closed the pipe; without this, Python complains again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(line: str) -> None:
    """Print a line of a run's log, on rank 0 alone."""
    if _is_first_rank():
        show(line)


def _end_writers() -> None:
    """Ends the background writers of a failed command: they cannot complete a checkpoint, and Python would wait."""
    for process in multiprocessing.active_children():
        process.kill()


def _end(exit_code: int, state: str, message: str, status: StatusFolder) -> int:
    if _is_first_rank():
        print(f"{PROG}: {message}", file=sys.stderr)
        status.write(exit_code, state, message)
    return exit_code


def _say_mistake(message: str, status: StatusFolder) -> int:
    message = f"error: {message}"
    if not _is_first_rank():
        _let_others_speak(OTHER_RANKS_WAIT_S)
        message = f"rank {os.environ['RANK']} on {socket.gethostname()}: {message}"
    print(f"{PROG}: {message}", file=sys.stderr)
    status.write(errors.EXIT_USAGE, "usage", message)
    return errors.EXIT_USAGE


def _say_failure(message: str, status: StatusFolder) -> int:
    if not _is_first_rank():
        # torchrun ends the others as soon as the first of them has left.
        _let_others_speak(SAME_STEP_S * (1 + min(launch.local_rank(), 3) / 4))
    print(f"{PROG}: {message}", file=sys.stderr, flush=True)
    status.write(errors.EXIT_FAILURE, "failed", message)
    return errors.EXIT_FAILURE


def _let_others_speak(seconds: float) -> None:
    # Training turns SIGTERM into "save and stop"; a rank that only waits to report ends at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)


def _is_first_rank() -> bool:
    try:
        return launch.rank() == 0
    except errors.UserError:
        # The mistake is RANK itself, and every process must be able to report it.
        return True
