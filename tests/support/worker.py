"""The program of one rank in a test group, started by torchrun: takes cases from a socket until the socket closes.

Usage: ``torchrun --nproc-per-node N tests/support/worker.py SOCKET_PATH``; ``ranks.RankPool`` is the other end.
"""

import faulthandler
import gc
import importlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from hft_megatron.engine import cpu_backend
from tests.support.ranks import FORGET

# Longer than any case: the launcher's own time-out must come first, because only that one shows every rank's stack.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def read_commands(stream: BinaryIO, commands: "queue.Queue[dict[str, Any]]") -> None:
    """Queue every command; leave the process when the launcher is gone, even from inside a stuck collective."""
    for line in stream:
        commands.put(json.loads(line))
    os._exit(0)


def forget_case() -> None:
    """Drop the process groups of the last case, which every rank must have left.

    A gloo group that is destroyed on one rank breaks a neighbour which is still receiving; one that stays has threads
    that wake a hundred times a second for as long as the pool waits.
    """
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    # destroy_model_parallel only forgets its groups; each would keep its sockets and threads for the whole session.
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


def run_case(target: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Run ``module:function`` and return its JSON-able value, or the traceback of whatever it raised."""
    try:
        module, _, name = target.partition(":")
        value = getattr(importlib.import_module(module), name)(**kwargs)
        json.dumps(value)
    except BaseException:  # also SystemExit: a rank that leaves must be reported
        return {"traceback": traceback.format_exc()}
    return {"value": value}


def main() -> None:
    socket_path = sys.argv[1]
    # torchrun puts this file's folder first on the path; cases are imported from the repository's root.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    cpu_backend.activate()
    stacks = open(f"{socket_path}.stacks-{rank}", "w")  # noqa: SIM115 (faulthandler keeps writing to it)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)

    connection = socket.socket(socket.AF_UNIX)
    connection.connect(socket_path)
    stream = connection.makefile("rwb")

    def reply(message: dict[str, Any]) -> None:
        sys.stdout.flush()
        stream.write(json.dumps(message).encode() + b"\n")
        stream.flush()

    commands: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=read_commands, args=(stream, commands), daemon=True).start()
    reply({"rank": rank, "pid": os.getpid()})
    while True:
        command = commands.get()
        if command == FORGET:
            forget_case()
        else:
            reply(run_case(command["target"], command["kwargs"]))


if __name__ == "__main__":
    main()
