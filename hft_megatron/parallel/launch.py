"""A process's place from torchrun's variables, the same for one without a launcher, and the hosts of a run."""

import contextlib
import os
import socket
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hft_megatron.errors import EXIT_CODES_VARIABLE, EXIT_OK, EXIT_STOPPED, UserError

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables of a launched process."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine, or a launcher's node, and the ranks that run on it."""

    name: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        """``ranks 0 to 7 on node-a``."""
        return f"{numbers_in_words(self.ranks)} on {self.name}"


def hosts_of(places: Sequence[tuple[str, str]]) -> tuple[Host, ...]:
    """The hosts in the order of their first rank.

    ``places`` has for every rank the name of its machine and its node's number by the launcher, because two nodes may
    have one name, as containers of one image do.
    """
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault(place, []).append(rank)
    return tuple(Host(name=place[0], ranks=tuple(members)) for place, members in ranks.items())


def numbers_in_words(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 0 to 3, 6``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    listed = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {listed}"


def rank(environment: MutableMapping[str, str] = os.environ) -> int:
    """Global rank of this process; 0 without a launcher."""
    return _number(environment, "RANK", default=0)


def local_rank(environment: MutableMapping[str, str] = os.environ) -> int:
    """Rank of this process among those of its node; 0 without a launcher."""
    return _number(environment, "LOCAL_RANK", default=0)


def world_size(environment: MutableMapping[str, str] = os.environ) -> int:
    """Ranks of the run over all nodes; 1 without a launcher. UserError when WORLD_SIZE is not a number above 0."""
    size = _number(environment, "WORLD_SIZE", default=1)
    if size < 1:
        raise UserError(f"WORLD_SIZE={size} in the environment must be at least 1.")
    return size


def place_this_process(environment: MutableMapping[str, str] = os.environ) -> None:
    """Gives a process without a launcher the environment of a run of one rank, so that it needs no torchrun.

    A launched process is left alone. UserError when only some of torchrun's variables are set: such a process would
    wait for others that never come.
    """
    if "RANK" not in environment and world_size(environment) == 1:
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        environment.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
        return
    missing = [name for name in _PLACE if name not in environment]
    if missing:
        raise UserError(
            f"{missing[0]} is missing from the environment, but other variables of torchrun are set; "
            f"start with torchrun, or unset RANK and WORLD_SIZE to run one process."
        )


@contextlib.contextmanager
def placed_process(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """``place_this_process`` within it; the environment is restored afterwards."""
    names = (*_PLACE, "LOCAL_WORLD_SIZE")
    before = {name: environment[name] for name in names if name in environment}
    place_this_process(environment)
    try:
        yield
    finally:
        for name in names:
            if name in before:
                environment[name] = before[name]
            else:
                environment.pop(name, None)


def forget_exit_code(environment: MutableMapping[str, str] = os.environ) -> None:
    """Removes the exit code that this rank left before torchrun restarted it.

    The number of restarts in the file's name would not do: torchrun doesn't count restarts after a host came or went.
    """
    file = _exit_code_file(environment)
    if file is not None:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def leave_exit_code(code: int, environment: MutableMapping[str, str] = os.environ) -> int:
    """Leaves a rank's exit code for ``parallel.start_ranks``, if that started it; returns the process's own exit code.

    Under --max-restarts that is 0 for a run that was stopped on request, which torchrun would otherwise restart.
    """
    file = _exit_code_file(environment)
    if file is None:
        return code
    is_left = False
    with contextlib.suppress(OSError):
        file.write_text(str(code))
        is_left = True
    restarts = is_left and environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    return EXIT_OK if restarts and code == EXIT_STOPPED else code


def _exit_code_file(environment: MutableMapping[str, str]) -> Path | None:
    """File in which this process leaves its exit code; None unless ``parallel.start_ranks`` started it."""
    folder = environment.get(EXIT_CODES_VARIABLE)
    return None if folder is None or "LOCAL_RANK" not in environment else Path(folder, environment["LOCAL_RANK"])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _number(environment: MutableMapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"{name}={value} in the environment is not a whole number; let torchrun set it, or unset it.")
    return int(value)
