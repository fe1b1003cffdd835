"""Rendezvous of the ranks of a run: torchrun's key-value store, and a part of it that no earlier start has written to.

Also a barrier without a time limit: inside a collective a waiting rank is aborted after --distributed-timeout-minutes.
It notices when a rank of this host has died, since torchrun may give the others minutes to end. Lost hosts are left to
the watchdog.

torchrun may keep one store over its restarts (always with --master-addr). Restarted ranks would then read the addresses
of dead ones, and try to reach them: "Gloo connectFullMesh failed".
"""

import functools
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from hft_megatron.errors import PeersLost
from hft_megatron.parallel.consensus import gathered
from hft_megatron.parallel.launch import numbers_in_words

ARRIVALS = "hft_megatron/arrivals"
"""The store's key for the number of arrivals of all ranks at barriers."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.002, 0.5
"""Seconds between two checks."""
_GROWTH = 1.25
"""Growth of the pauses: nobody waits more than a quarter longer than the last rank takes."""


def wait_for_all_ranks() -> None:
    """Returns when all ranks of the default group have called it, without a time limit.

    Raises PeersLost where another rank of this host has died. A process's first call is a collective.
    """
    others = _ranks_of_this_host()
    store, ranks = dist.distributed_c10d._get_default_store(), dist.get_world_size()
    # No rank reaches the next barrier before all have reached this one, so one count serves them all.
    arrived = store.add(ARRIVALS, 1)
    all_here = -(-arrived // ranks) * ranks
    pause = FIRST_PAUSE_S
    while store.add(ARRIVALS, 0) < all_here:
        time.sleep(pause)
        pause = min(_GROWTH * pause, LONGEST_PAUSE_S)
        _check_lives(others)
    # By now a matter of half a second. Without it a rank that continues and ends may take the store away from others.
    dist.barrier()


@functools.cache
def _ranks_of_this_host() -> dict[int, int]:
    """Process ids, by rank, of the ranks whose processes this one can see."""
    place = (Path("/proc/sys/kernel/random/boot_id").read_text(), os.stat("/proc/self/ns/pid").st_ino)
    return {rank: pid for rank, (theirs, pid) in enumerate(gathered((place, os.getpid()))) if theirs == place}


def _check_lives(processes: dict[int, int]) -> None:
    for rank, pid in processes.items():
        try:
            is_dead = psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            is_dead = True
        if is_dead:
            raise PeersLost(f"rank {rank} (process {pid} on this host) died while others waited for it")


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """One start of all ranks."""

    address: str
    port: int
    minutes: float
    """Time limit of every wait."""
    rank: int
    world_size: int
    store: Store
    """Key-value store, empty at the start whatever came before."""
    prefix: str
    """Prefix of its keys in the store at ``address``."""

    @property
    def timeout(self) -> timedelta:
        return timedelta(minutes=self.minutes)


def meet(minutes: float) -> Meeting:
    """Connects to the store that torchrun's environment names, and agrees with all other ranks on a new start.

    Raises PeersLost when the store, or another rank, cannot be reached within ``minutes``.
    """
    deadline = time.monotonic() + 60.0 * minutes
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(minutes=minutes)))
        store.set_timeout(timedelta(minutes=minutes))
        call = _call if rank == 0 else _answer
        name = call(store, rank, world_size, deadline)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise did_not_meet(minutes, str(error).strip().partition("\n")[0]) from error
    prefix = f"hft_megatron/{name}"
    return Meeting(
        address=address,
        port=port,
        minutes=minutes,
        rank=rank,
        world_size=world_size,
        store=PrefixStore(prefix, store),
        prefix=prefix,
    )


def did_not_meet(minutes: float, reason: str) -> PeersLost:
    """The error of ranks that waited for others in vain."""
    return PeersLost(
        f"the ranks did not all meet at the rendezvous endpoint {os.environ['MASTER_ADDR']}:"
        f"{os.environ['MASTER_PORT']} within --distributed-timeout-minutes {minutes:g} ({reason.rstrip('.')}); check "
        f"that host, the network to it, and the logs of the other hosts"
    )


def _call(store: Store, rank: int, world_size: int, deadline: float) -> str:
    """The part of rank 0: it creates a start, which replaces all earlier ones, and names it when all ranks are there.

    Whenever any rank is restarted so is rank 0, sooner or later.
    """
    number, others = store.add("hft_megatron/starts", 1), range(1, world_size)
    for pause in _pauses(deadline):
        if store.check([_joined(number, other) for other in others]):
            name = f"{number}-{uuid.uuid4().hex}"
            store.set(_name(number), name)
            return name
        time.sleep(pause)
    missing = [other for other in others if not store.check([_joined(number, other)])]
    raise dist.DistStoreError(f"{numbers_in_words(missing)} did not arrive")


def _answer(store: Store, rank: int, world_size: int, deadline: float) -> str:
    """The part of the others: they join the newest start. If this rank's number has joined it before, the ranks of that
    start have died, and rank 0 will create another."""
    joined = 0
    for pause in _pauses(deadline):
        newest = store.add("hft_megatron/starts", 0)
        if newest > joined and store.add(_joined(newest, rank), 1) == 1:
            joined = newest
        if joined and store.check([_name(joined)]):
            return str(store.get(_name(joined)).decode())
        time.sleep(pause)
    raise dist.DistStoreError("rank 0 did not arrive" if joined == 0 else "rank 0 is waiting for others")


def _pauses(deadline: float) -> Iterator[float]:
    """Seconds between two checks, growing, until ``deadline``."""
    pause = 0.01
    while time.monotonic() < deadline:
        yield pause
        pause = min(2 * pause, 0.5)


def _joined(number: int, rank: int) -> str:
    return f"hft_megatron/start {number}/rank {rank}"


def _name(number: int) -> str:
    return f"hft_megatron/start {number}/name"
