"""What torchrun tells a process about its place, and the same for a process that nobody launched."""

import contextlib
import os
import socket
from collections.abc import MutableMapping
from pathlib import Path

from hft_megatron.errors import EXIT_CODES_VARIABLE, EXIT_OK, EXIT_STOPPED, UserError


def rank(environment: MutableMapping[str, str] = os.environ) -> int:
    """Global rank of this process; 0 when nobody launched it."""
    return _number(environment, "RANK", default=0)


def local_rank(environment: MutableMapping[str, str] = os.environ) -> int:
    """Rank of this process among those of its node; 0 when nobody launched it."""
    return _number(environment, "LOCAL_RANK", default=0)


def world_size(environment: MutableMapping[str, str] = os.environ) -> int:
    """Ranks of the run over all nodes; 1 when nobody launched it. UserError when WORLD_SIZE is not a number above 0."""
    size = _number(environment, "WORLD_SIZE", default=1)
    if size < 1:
        raise UserError(f"WORLD_SIZE={size} in the environment must be at least 1.")
    return size


def place_this_process(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give a process that nobody launched the environment of a run of one rank, so that it needs no torchrun.

    A launched process is left alone. UserError when only a part of torchrun's variables is there: such a
    process would wait for others that never come.
    """
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" not in environment and world_size(environment) == 1:
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        environment.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
        return
    missing = [name for name in needed if name not in environment]
    if missing:
        raise UserError(
            f"{missing[0]} is missing from the environment although other variables of torchrun are set; "
            f"start with torchrun, or unset RANK and WORLD_SIZE to run on one process."
        )


def leave_exit_code(code: int, environment: MutableMapping[str, str] = os.environ) -> int:
    """Leave a rank's exit code for ``parallel.start_ranks``, if that started it; returns what the process ends with.

    Under --max-restarts that is 0 for a run that stopped as it was asked to, which torchrun would start again.
    """
    folder = environment.get(EXIT_CODES_VARIABLE)
    if folder is None or "LOCAL_RANK" not in environment:
        return code
    is_left = False
    with contextlib.suppress(OSError):
        Path(folder, environment["LOCAL_RANK"]).write_text(str(code))
        is_left = True
    restarts = is_left and environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    return EXIT_OK if restarts and code == EXIT_STOPPED else code


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _number(environment: MutableMapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"{name}={value} in the environment is not a whole number; torchrun sets it.")
    return int(value)
