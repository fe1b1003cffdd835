"""The errors a person can cause and the exit codes a run can end with."""

from collections.abc import Callable

EXIT_OK = 0
EXIT_FAILURE = 1
"""The run failed: one sentence or a traceback says where."""
EXIT_USAGE = 2
"""A user's mistake: one sentence on standard error says what and how to fix it."""
EXIT_STOPPED = 3
"""A signal, a time limit or --exit-interval stopped the run; with --save the checkpoint is written and a restart goes
on from it."""
EXIT_INTERRUPTED = 130
"""Ctrl-C where no checkpoint could be written (before training started); shells report the same number."""

EXIT_CODES_VARIABLE = "HFT_MEGATRON_EXIT_CODES"
"""In the environment of ranks: the folder in which they leave their exit codes, which torchrun doesn't hand on."""


class UserError(Exception):
    """A mistake the user can fix.

    The message is one sentence: the option or file and line, the value, the rule, and the nearest fix. Several options
    that can't be had are told at once, in a line each.
    The process boundary prints it on one rank and exits with ``EXIT_USAGE``.
    """


class Stopped(Exception):
    """A signal, a time limit or --exit-interval ended the run, and with --save the checkpoint is written; ends with
    ``EXIT_STOPPED``.

    The message is one sentence: the reason, the iteration and the folder that a restart goes on from.
    """


class RunFailed(Exception):
    """A run cannot be trusted to go on, for a reason that no traceback explains; ends with ``EXIT_FAILURE``.

    The message is one sentence, the same on every rank: what was found, and where.
    """


class RankFailed(Exception):
    """One rank can't go on, for a reason that the others don't know; ends with ``EXIT_FAILURE``.

    The message is one sentence that names the rank and the nearest fix. Of several ranks with the same reason the first
    one says it.
    """


class PeersLost(Exception):
    """Other hosts or ranks of the run can't be reached; ends with ``EXIT_FAILURE``.

    The message is one sentence that names the host, rank or endpoint. It is said by one rank on every host, because
    nobody knows which of them is looked at.
    """

    def __init__(self, message: str, *, speaks: bool | None = None) -> None:
        """``speaks`` is whether this rank is the one of its host that says it; the first one where it is None."""
        super().__init__(message)
        self.speaks = speaks


OnLoss = Callable[[PeersLost], None]
"""What is called, on another thread, when a host is lost; the process ends after it."""
