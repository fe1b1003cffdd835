"""The other ranks of a command: when they meet, on which hosts they are, and that none of those is lost in silence."""

import contextlib
import json
import os
from collections.abc import Iterator

import torch.distributed as dist

from hft_megatron.config.schema import ParallelConfig
from hft_megatron.parallel.groups import host_name, start_backend
from hft_megatron.parallel.hosts import Host, hosts_of
from hft_megatron.parallel.meeting import Meeting, did_not_meet, meet
from hft_megatron.parallel.watchdog import OnLoss, Watchdog


@contextlib.contextmanager
def peers(minutes: float, on_loss: OnLoss) -> Iterator["Peers"]:
    """Meets the other ranks, for which ``minutes`` are waited; an error within ends this rank's watch.

    ``on_loss`` gets the sentence about a lost host, on another thread, and the process ends after it. Raises PeersLost.
    """
    company = Peers(None if dist.is_initialized() else meet(minutes), on_loss)
    try:
        yield company
    except BaseException:
        company.abandon()
        raise


class Peers:
    """What ``peers`` yields."""

    def __init__(self, meeting: Meeting | None, on_loss: OnLoss) -> None:
        """Begins to watch; collective. Raises PeersLost where not all ranks come.

        ``meeting`` is None where the default process group exists already: it is then not ours to watch over.
        """
        self.hosts: tuple[Host, ...] = ()
        self._meeting = meeting
        self._watchdog: Watchdog | None = None
        if meeting is not None:
            with _in_time(meeting.minutes):
                self.hosts = _hosts(meeting)
                if len(self.hosts) > 1:
                    self._watchdog = _started(Watchdog(meeting, self.hosts, on_loss), meeting)

    def join(self, parallel: ParallelConfig) -> None:
        """Makes the default process group; collective. One that exists is left as it is.

        Raises UserError where a rank can't have a device, PeersLost where not all ranks come.
        """
        if self._meeting is None or not dist.is_initialized():
            with _in_time(parallel.distributed_timeout_minutes):
                start_backend(parallel, self._meeting)

    def leave(self) -> None:
        """Ends the watch when all ranks have come here, at the end of their work."""
        if self._watchdog is not None:
            self._watchdog.leave()

    def abandon(self) -> None:
        """Ends the watch on this rank; where it is about to name a host it has lost, this does not return."""
        if self._watchdog is not None:
            self._watchdog.abandon()


@contextlib.contextmanager
def _in_time(minutes: float) -> Iterator[None]:
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise did_not_meet(minutes, str(error).strip().partition("\n")[0]) from error


def _hosts(meeting: Meeting) -> tuple[Host, ...]:
    """Where all ranks are. By way of the store, because a collective would wait for a lost host without a watch."""
    store = meeting.store
    store.set(_place_of(meeting.rank), json.dumps([host_name(), os.environ.get("GROUP_RANK", "")]))
    if meeting.rank == 0:
        places = store.multi_get([_place_of(rank) for rank in range(meeting.world_size)])
        store.set("places", json.dumps([json.loads(place) for place in places]))
    return hosts_of([(name, node) for name, node in json.loads(store.get("places"))])


def _place_of(rank: int) -> str:
    return f"place of rank {rank}"


def _started(watchdog: Watchdog, meeting: Meeting) -> Watchdog:
    watchdog.connect()
    # Every host must have counted once before any rank looks at them.
    if meeting.store.add("ranks that count", 1) == meeting.world_size:
        meeting.store.set("all count", "1")
    meeting.store.wait(["all count"])
    watchdog.start()
    return watchdog
