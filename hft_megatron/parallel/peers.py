"""The other ranks of a command: when they meet, on which hosts they are, and that none of those is lost in silence."""

import contextlib
import json
import os
from collections.abc import Iterator

import torch.distributed as dist

from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.errors import EXIT_FAILURE, OnLoss, PeersLost
from hft_megatron.parallel.groups import host_name, start_backend
from hft_megatron.parallel.launch import Host, hosts_of
from hft_megatron.parallel.meeting import Meeting, did_not_meet, meet, wait_for_all_ranks
from hft_megatron.parallel.neighbours import Neighbours, Process
from hft_megatron.parallel.watchdog import Watchdog

CONNECTION_WAIT_S = 5.0
"""How long after a connection is lost the end of the other process is waited for."""


@contextlib.contextmanager
def peers(minutes: float, on_loss: OnLoss) -> Iterator["Peers"]:
    """Meets the other ranks, for which ``minutes`` are waited; an error within ends this rank's watch.

    ``on_loss`` gets the word about a lost host or rank, on another thread, and the process ends after it. Raises
    PeersLost, also in the place of the error that a collective gives where a rank has ended.
    """
    company = Peers(None if dist.is_initialized() else meet(minutes), on_loss)
    try:
        yield company
    except BaseException as error:
        loss = company.loss_behind(error)
        company.abandon()
        if loss is not None:
            raise loss from error
        raise


class Peers:
    """What ``peers`` yields."""

    def __init__(self, meeting: Meeting | None, on_loss: OnLoss) -> None:
        """Begins to watch; collective. Raises PeersLost where not all ranks come.

        ``meeting`` is None where the default process group exists already: it is then not ours to watch over.
        """
        self.hosts: tuple[Host, ...] = ()
        self._meeting = meeting
        self._on_loss = on_loss
        self._watchdog: Watchdog | None = None
        self._neighbours: Neighbours | None = None
        if meeting is not None:
            with _in_time(meeting.minutes):
                self.hosts, processes = _places(meeting)
                if len(self.hosts) > 1:
                    self._watchdog = _started(Watchdog(meeting, self.hosts, on_loss), meeting)
            self._neighbours = Neighbours(meeting.rank, processes, host_name(), self._end)
            self._neighbours.start()

    def join(self, parallel: ParallelConfig) -> None:
        """Makes the default process group; collective. One that exists is left as it is.

        Raises UserError where a rank can't have a device, PeersLost where not all ranks come.
        """
        if self._meeting is None or not dist.is_initialized():
            with _in_time(parallel.distributed_timeout_minutes):
                start_backend(parallel, self._meeting)

    def leave(self) -> None:
        """Ends the watch when all ranks have come here, at the end of their work."""
        if self._neighbours is not None:
            wait_for_all_ranks()
            self._neighbours.stop()
        if self._watchdog is not None:
            self._watchdog.leave()

    def abandon(self) -> None:
        """Ends the watch on this rank; where it is about to name a host or rank it has lost, this does not return."""
        if self._neighbours is not None:
            self._neighbours.stop()
        if self._watchdog is not None:
            self._watchdog.abandon()

    def loss_behind(self, error: BaseException) -> PeersLost | None:
        """The word about the rank whose end this rank's ``error`` comes from; None for an error of its own.

        Of a rank on another host that host's ranks know, or the watchdog: this then does not return.
        """
        is_known = isinstance(error, PeersLost)
        if self._neighbours is None or not (is_known or _is_of_a_connection(error)):
            return None
        loss = self._neighbours.loss(0.0 if is_known else CONNECTION_WAIT_S)
        if self._watchdog is not None:
            if loss is not None:
                self._watchdog.tell(loss)
            if not is_known:
                self._watchdog.wait_for_verdict()
        return loss

    def _end(self, loss: PeersLost) -> None:
        """On the neighbours' thread."""
        if self._watchdog is not None:
            self._watchdog.tell(loss)
        self._on_loss(loss)
        os._exit(EXIT_FAILURE)


def _is_of_a_connection(error: BaseException) -> bool:
    """Whether a collective or the store says that it can't reach others: gloo's errors have no type of their own."""
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@contextlib.contextmanager
def _in_time(minutes: float) -> Iterator[None]:
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise did_not_meet(minutes, str(error).strip().partition("\n")[0]) from error


def _places(meeting: Meeting) -> tuple[tuple[Host, ...], dict[int, Process]]:
    """Hosts, and every rank's process. By way of the store: a collective would wait for a lost host without a watch."""
    store, own = meeting.store, Process.own()
    place = [host_name(), os.environ.get("GROUP_RANK", ""), own.pid, own.namespace]
    store.set(_place_of(meeting.rank), json.dumps(place))
    if meeting.rank == 0:
        places = store.multi_get([_place_of(rank) for rank in range(meeting.world_size)])
        store.set("places", json.dumps([json.loads(place) for place in places]))
    found = json.loads(store.get("places"))
    processes = {rank: Process(pid, namespace) for rank, (_, _, pid, namespace) in enumerate(found)}
    return hosts_of([(name, node) for name, node, _, _ in found]), processes


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
