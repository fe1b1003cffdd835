"""``python -m hft_megatron.parallel.start_ranks``: torchrun, for scripts that pass on a run's exit code.

It takes torchrun's arguments and starts ranks with torchrun's own code. torchrun always ends with 1 and a traceback of
forty lines; this process ends with the exit code of the ranks, and their messages come last. Ranks that could not
report themselves, such as killed ones, get a line about how they ended.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from hft_megatron import errors

TOLD = (errors.EXIT_USAGE, errors.EXIT_STOPPED, errors.EXIT_INTERRUPTED)
"""Exit codes whose ranks have reported the reason themselves."""
PASSED_ON = ("Sending process %s closing signal", "Received %s death signal", "Got termination signal")
"""Beginnings of torchrun's lines about signals that it passes on."""


class Failure(Protocol):
    """The part of torchrun's ``ProcessFailure`` that is used here."""

    local_rank: int
    pid: int
    exitcode: int
    """Minus the number of the signal that ended the rank."""


def main(words: Sequence[str] | None = None) -> int:
    """Starts ranks with the arguments ``words``, or the command line's; returns the exit code of this node's ranks."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _stop_without_ranks)  # until torchrun's code starts ranks, and listens itself
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import determine_local_world_size, parse_args, run

    options = parse_args(words)
    for module in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{module}").addFilter(_is_news)
    folder = tempfile.mkdtemp(prefix="hft-megatron-exit-codes-")
    os.environ[errors.EXIT_CODES_VARIABLE] = folder
    try:
        run(options)
        return worst(_left_codes(folder).values())  # under --max-restarts a stopped run is a success for torchrun
    except ChildFailedError as error:
        lines, code = judged(error.failures.values())
        print("".join(f"hft-megatron: {line}\n" for line in lines), end="", file=sys.stderr)
        return code
    except SignalException as error:
        after = code_after_signal(_left_codes(folder), determine_local_world_size(options.nproc_per_node))
        return _stopped_too_early(error.sigval) if after is None else after
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def worst(codes: Iterable[int]) -> int:
    """The exit code for all ranks: a user's mistake explains other failures, and a failure counts before a stop."""
    found = set(codes)
    order = (errors.EXIT_USAGE, errors.EXIT_FAILURE, errors.EXIT_INTERRUPTED, errors.EXIT_STOPPED)
    return next((code for code in order if code in found), errors.EXIT_OK)


def judged(failures: Iterable[Failure]) -> tuple[list[str], int]:
    """Lines about the ranks that ended without an exit code of the run's own, and the exit code for all."""
    # torchrun itself ends the others by SIGTERM when one has failed.
    failed = [failure for failure in failures if failure.exitcode != -signal.SIGTERM] or list(failures)
    untold = [failure for failure in failed if failure.exitcode not in (*TOLD, errors.EXIT_FAILURE)]
    code = worst(failure.exitcode if failure.exitcode in TOLD else errors.EXIT_FAILURE for failure in failed)
    if code == errors.EXIT_USAGE:
        return [], code
    return [f"local rank {failure.local_rank} (process {failure.pid}) {_end_of(failure)}" for failure in untold], code


def code_after_signal(left: Mapping[int, int], ranks: int) -> int | None:
    """Exit code of the ranks after a signal; None where they ended without one, before they could save.

    0 where all have finished: the signal came in the last iteration, or later.
    """
    code = worst(left.values())
    return None if code == errors.EXIT_OK and len(left) < ranks else code


def _end_of(failure: Failure) -> str:
    if failure.exitcode < 0:
        return f"was killed by {signal.Signals(-failure.exitcode).name}"
    return f"ended with exit code {failure.exitcode}"


def _stop_without_ranks(number: int, frame: object) -> None:
    os._exit(_stopped_too_early(signal.Signals(number)))


def _stopped_too_early(number: signal.Signals) -> int:
    sentence = f"{number.name} stopped the run before it could save; run the command again to resume from its newest "
    print(f"hft-megatron: {sentence}checkpoint, if there is one", file=sys.stderr, flush=True)
    return errors.EXIT_INTERRUPTED if number == signal.SIGINT else errors.EXIT_STOPPED


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a line of torchrun's adds to the other messages."""
    text = str(record.msg)
    if text.startswith("failed (exitcode") and isinstance(record.args, tuple):
        return record.args[0] not in TOLD
    return not text.startswith(PASSED_ON)


def _left_codes(folder: str) -> dict[int, int]:
    """Exit codes by local rank."""
    return {int(file.name): int(file.read_text()) for file in Path(folder).iterdir()}


if __name__ == "__main__":
    sys.exit(main())
