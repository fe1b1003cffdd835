"""The errors a person can cause and the exit codes a run can end with."""

from collections.abc import Callable

EXIT_OK = 0
EXIT_FAILURE = 1
"""The run failed: one sentence or a traceback shows where."""
EXIT_USAGE = 2
"""A user's mistake: one sentence on standard error names it and its fix."""
EXIT_STOPPED = 3
"""A signal, a time limit or --exit-interval stopped the run; with --save the checkpoint is written and a restart
resumes from it."""
EXIT_INTERRUPTED = 130
"""Ctrl-C where no checkpoint could be written (before training started); shells report the same number."""

EXIT_CODES_VARIABLE = "HFT_MEGATRON_EXIT_CODES"
"""Environment variable of ranks with the folder for their exit codes, which torchrun doesn't pass on."""


class UserError(Exception):
    """A mistake the user can fix.

    The message is one sentence: the option or file and line, the value, the rule, and the nearest fix. Several options
    that are not valid are reported at once, in a line each. The process boundary prints it on one rank and exits with
    ``EXIT_USAGE``.
    """


class Stopped(Exception):
    """A signal, a time limit or --exit-interval ended the run, and with --save the checkpoint is written; ends with
    ``EXIT_STOPPED``.

    The message is one sentence: the reason, the iteration and the folder that a restart resumes from.
    """


class RunFailed(Exception):
    """A run cannot continue, for a reason that no traceback explains; ends with ``EXIT_FAILURE``.

    The message is one sentence, the same on every rank: the problem, and its place.
    """


class RankFailed(Exception):
    """One rank cannot continue, for a reason that the others don't know; ends with ``EXIT_FAILURE``.

    The message is one sentence that names the rank and the nearest fix. Of several ranks with the same reason the first
    one reports it.
    """


class PeersLost(Exception):
    """Other hosts or ranks of the run cannot be reached; ends with ``EXIT_FAILURE``.

    The message is one sentence that names the host, rank or endpoint. One rank on every host reports it, because any of
    their logs may be the one that is read.
    """

    def __init__(self, message: str, *, speaks: bool | None = None) -> None:
        """``speaks`` tells whether this rank reports it for its host; None leaves that to the host's first rank."""
        super().__init__(message)
        self.speaks = speaks


OnLoss = Callable[[PeersLost], None]
"""Function that is called, on another thread, when a host is lost; the process ends after it."""
