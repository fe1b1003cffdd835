"""The other ranks of a command: their rendezvous, their hosts, and a watch for lost hosts and ranks."""

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
"""Seconds to wait for the end of the other process after a connection is lost."""


@contextlib.contextmanager
def peers(minutes: float, on_loss: OnLoss) -> Iterator["Peers"]:
    """Meets the other ranks, waiting for ``minutes``; an error within ends this rank's watch.

    ``on_loss`` gets the error about a lost host or rank, on another thread, and the process ends after it. Raises
    PeersLost, also in the place of a collective's error where a rank has ended.
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
    """The other ranks, as ``peers`` yields them."""

    def __init__(self, meeting: Meeting | None, on_loss: OnLoss) -> None:
        """Begins to watch; collective. Raises PeersLost where not all ranks arrive.

        ``meeting`` is None where the default process group exists already: it is then not watched here.
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
        """Creates the default process group; collective. An existing one is kept.

        Raises UserError where a rank has no device, PeersLost where not all ranks arrive.
        """
        if self._meeting is None or not dist.is_initialized():
            with _in_time(parallel.distributed_timeout_minutes):
                start_backend(parallel, self._meeting)

    def leave(self) -> None:
        """Ends the watch when all ranks have called it, at the end of their work."""
        if self._neighbours is not None:
            wait_for_all_ranks()
            self._neighbours.stop()
        if self._watchdog is not None:
            self._watchdog.leave()

    def abandon(self) -> None:
        """Ends the watch on this rank; does not return if the watch is already reporting a lost host or rank."""
        if self._neighbours is not None:
            self._neighbours.stop()
        if self._watchdog is not None:
            self._watchdog.abandon()

    def loss_behind(self, error: BaseException) -> PeersLost | None:
        """The error about the rank whose end caused this rank's ``error``; None for an error of its own.

        A rank on another host is reported by that host's ranks, or by the watchdog: this then does not return.
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
        """Reports the loss and ends the process, on the neighbours' thread."""
        if self._watchdog is not None:
            self._watchdog.tell(loss)
        self._on_loss(loss)
        os._exit(EXIT_FAILURE)


def _is_of_a_connection(error: BaseException) -> bool:
    """Return whether a collective or the store cannot reach others: gloo's errors have no type of their own."""
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@contextlib.contextmanager
def _in_time(minutes: float) -> Iterator[None]:
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise did_not_meet(minutes, str(error).strip().partition("\n")[0]) from error


def _places(meeting: Meeting) -> tuple[tuple[Host, ...], dict[int, Process]]:
    """Hosts, and every rank's process, through the store: a collective would wait for a lost host without a watch."""
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
    # Every host must have counted once before any rank checks it.
    if meeting.store.add("ranks that count", 1) == meeting.world_size:
        meeting.store.set("all count", "1")
    meeting.store.wait(["all count"])
    watchdog.start()
    return watchdog
