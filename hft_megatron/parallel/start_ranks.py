"""``python -m hft_megatron.parallel.start_ranks``: torchrun, for scripts that pass a run's exit code on.

It takes torchrun's words and starts ranks by torchrun's own code. torchrun ends with 1 and with a trace of forty lines
whatever happened; this process ends with the code that the ranks have left, and what they said is the last word. Those
that could say nothing themselves, such as killed ones, get a line that says how they ended.
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
"""Exit codes whose ranks have said all there is to say."""
PASSED_ON = ("Sending process %s closing signal", "Received %s death signal", "Got termination signal")
"""How torchrun's lines about a signal that it passes on begin."""


class Failure(Protocol):
    """What is read of torchrun's ``ProcessFailure``."""

    local_rank: int
    pid: int
    exitcode: int
    """Minus the number of the signal that ended the rank."""


def main(words: Sequence[str] | None = None) -> int:
    """Start ranks by ``words``, or those of the command line; returns the exit code of this node's ranks."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _stop_without_ranks)  # until torchrun's code starts some, and listens itself
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
        return worst(_left_codes(folder).values())  # under --max-restarts a stopped run ends well for torchrun
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
    """The code that stands for all ranks: a mistake explains failures of others, and a failure counts before a stop."""
    found = set(codes)
    order = (errors.EXIT_USAGE, errors.EXIT_FAILURE, errors.EXIT_INTERRUPTED, errors.EXIT_STOPPED)
    return next((code for code in order if code in found), errors.EXIT_OK)


def judged(failures: Iterable[Failure]) -> tuple[list[str], int]:
    """Lines about the ranks that ended by something else than a code of the run's, and the exit code of all."""
    # torchrun itself ends the others by SIGTERM when one has failed.
    failed = [failure for failure in failures if failure.exitcode != -signal.SIGTERM] or list(failures)
    untold = [failure for failure in failed if failure.exitcode not in (*TOLD, errors.EXIT_FAILURE)]
    code = worst(failure.exitcode if failure.exitcode in TOLD else errors.EXIT_FAILURE for failure in failed)
    if code == errors.EXIT_USAGE:
        return [], code
    return [f"local rank {failure.local_rank} (process {failure.pid}) {_end_of(failure)}" for failure in untold], code


def code_after_signal(left: Mapping[int, int], ranks: int) -> int | None:
    """What the ranks left after a signal; None where they ended without a word, before they could save.

    0 where all have finished: the signal came in the last iteration, or later.
    """
    code = worst(left.values())
    return None if code == errors.EXIT_OK and len(left) < ranks else code


def _end_of(failure: Failure) -> str:
    if failure.exitcode < 0:
        return f"was ended by {signal.Signals(-failure.exitcode).name}"
    return f"ended with exit code {failure.exitcode}"


def _stop_without_ranks(number: int, frame: object) -> None:
    os._exit(_stopped_too_early(signal.Signals(number)))


def _stopped_too_early(number: signal.Signals) -> int:
    sentence = f"{number.name} stopped the run before it could save; start it again, and it resumes from its newest "
    print(f"hft-megatron: {sentence}checkpoint, if it has one", file=sys.stderr, flush=True)
    return errors.EXIT_INTERRUPTED if number == signal.SIGINT else errors.EXIT_STOPPED


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of torchrun's says what nothing else does."""
    text = str(record.msg)
    if text.startswith("failed (exitcode") and isinstance(record.args, tuple):
        return record.args[0] not in TOLD
    return not text.startswith(PASSED_ON)


def _left_codes(folder: str) -> dict[int, int]:
    """By local rank."""
    return {int(file.name): int(file.read_text()) for file in Path(folder).iterdir()}


if __name__ == "__main__":
    sys.exit(main())
