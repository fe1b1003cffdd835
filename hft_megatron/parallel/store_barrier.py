"""A barrier on the rendezvous store, for waits that may be long: while one rank writes a file, above all.

A rank that waits for it inside a collective is aborted after --distributed-timeout-minutes. Here it waits for as long
as it takes. That a rank of this host has died is seen here: torchrun may leave the others minutes to end. A host that
is gone is the watchdog's.
"""

import functools
import os
import time
from pathlib import Path

import psutil
import torch.distributed as dist

from hft_megatron.errors import PeersLost

ARRIVALS = "hft_megatron/arrivals"
"""The store's key for how often any rank has come to a barrier."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.002, 0.5
"""Between two looks."""
_GROWTH = 1.25
"""Of the pauses: nobody waits for a quarter longer than the last rank takes."""


def wait_for_all_ranks() -> None:
    """Returns when all ranks of the default group have called it; has no time limit.

    Raises PeersLost where another rank of this host has died. A process's first call is a collective.
    """
    others = _ranks_of_this_host()
    store, ranks = dist.distributed_c10d._get_default_store(), dist.get_world_size()
    # Nobody comes to the next barrier before all have come to this one, so that one count serves them all.
    arrived = store.add(ARRIVALS, 1)
    all_here = -(-arrived // ranks) * ranks
    pause = FIRST_PAUSE_S
    while store.add(ARRIVALS, 0) < all_here:
        time.sleep(pause)
        pause = min(_GROWTH * pause, LONGEST_PAUSE_S)
        _check_lives(others)
    # By now a matter of half a second. Without it a rank that goes on, and ends, may take the store away from others.
    dist.barrier()


@functools.cache
def _ranks_of_this_host() -> dict[int, int]:
    """rank -> process id of the ranks whose processes this one can see."""
    place = (Path("/proc/sys/kernel/random/boot_id").read_text(), os.stat("/proc/self/ns/pid").st_ino)
    everyone = [(place, 0)] * dist.get_world_size()
    dist.all_gather_object(everyone, (place, os.getpid()))
    return {rank: pid for rank, (theirs, pid) in enumerate(everyone) if theirs == place}


def _check_lives(processes: dict[int, int]) -> None:
    for rank, pid in processes.items():
        try:
            is_dead = psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            is_dead = True
        if is_dead:
            raise PeersLost(f"rank {rank} (process {pid} of this host) has died while others waited for it")
