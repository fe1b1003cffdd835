"""Ends this process when a host of the run, or the rendezvous store, has gone silent.

A collective whose partner's host is gone waits until the process group's time-out, and cannot be interrupted. So a
thread of every rank increments its host's counter in the store and checks that the others' counters increase. Ranks of
the first host check all hosts and write down the missing one; all others check the first host and that verdict, so that
a round costs the store little on a thousand ranks. A second thread notices when the store itself does not answer.

A host counts as silent when none of its ranks has counted for the limit, so that a rank which holds the interpreter's
lock for long is not taken for lost. Silence is measured while this process runs, and a long pause between two checks
counts as a short one: a process that was stopped or suspended does not blame the others.

A rank that has ended is noticed by the others of its host (``neighbours``), and the watchdog passes their report on.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from hft_megatron.errors import EXIT_FAILURE, OnLoss, PeersLost
from hft_megatron.parallel.launch import Host
from hft_megatron.parallel.meeting import Meeting

LONGEST_LIMIT_S = 120.0
"""Far above a network outage of seconds, and TCP's growing pauses between retries."""
LOOKS_PER_LIMIT = 12
LONGEST_PAUSE_S = 5.0
"""Seconds between two checks."""
FIRST_PAUSE_AT_THE_END_S, LONGEST_PAUSE_AT_THE_END_S = 0.02, 1.0
"""Pauses between checks at the end: nearly always all ranks end together, but an export may keep others waiting."""
SAY_WITHIN_S = 5.0
"""Time limit for the report, since the status file may be on the lost host."""


def limit_of(minutes: float) -> float:
    """Seconds of silence after which a host is lost: at most half of --distributed-timeout-minutes, so that the message
    comes before the collectives' own error."""
    return min(LONGEST_LIMIT_S, 30.0 * minutes)


def counter_of(host: int) -> str:
    """The store's key for a host, by its place in the table."""
    return f"host {host}"


class Watchdog:
    """One rank's part in the watch over at least two hosts, from ``start`` to ``leave`` or ``abandon``."""

    def __init__(
        self, meeting: Meeting, hosts: Sequence[Host], on_loss: OnLoss, *, limit_s: float | None = None
    ) -> None:
        """``on_loss`` is called on another thread, and the process ends after it."""
        assert len(hosts) > 1
        self._meeting, self._hosts, self._on_loss = meeting, hosts, on_loss
        self._limit = limit_of(meeting.minutes) if limit_s is None else limit_s
        self._pause = min(LONGEST_PAUSE_S, self._limit / LOOKS_PER_LIMIT)
        self._mine = next(place for place, host in enumerate(hosts) if meeting.rank in host.ranks)
        watched = [place for place in range(len(hosts)) if place != self._mine] if self._mine == 0 else [0]
        self._counts: dict[int, bytes] = dict.fromkeys(watched, b"")
        self._silent: dict[int, float] = dict.fromkeys(watched, 0.0)
        self._lost_rank: PeersLost | None = None
        self._store: Store | None = None
        self._awake = self._answered = 0.0
        """Seconds that this process has run, and those at the store's last answer; each is written by one thread."""
        self._leaving, self._all_left = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._over = False
        self._ending = False
        self._exchanging = threading.Thread(target=self._exchange, name="watchdog", daemon=True)
        self._judging = threading.Thread(target=self._judge_store, name="watchdog-store", daemon=True)

    def connect(self) -> None:
        """Connects and counts for the first time. Raises torch's DistNetworkError or DistStoreError."""
        self._store = self._connect()
        self._store.add(counter_of(self._mine), 1)

    def start(self) -> None:
        """Begins to watch; every rank must have counted."""
        self._exchanging.start()
        self._judging.start()

    def leave(self) -> None:
        """Returns when every rank has called it, since one that leaves early would be missed; watches until then."""
        self._leaving.set()
        while self._exchanging.is_alive() and not self._all_left.wait(LONGEST_PAUSE_AT_THE_END_S):
            pass
        self.abandon()

    def abandon(self) -> None:
        """Ends the watch on this rank alone, which is about to end by itself. Does not return if the watch is already
        ending it."""
        with self._lock:
            self._over = True
            ending = self._ending
        if ending:
            threading.Event().wait()
        # A thread that returns from torch while Python shuts down would abort the process.
        self._leaving.set()
        self._exchanging.join(LONGEST_PAUSE_AT_THE_END_S)

    def tell(self, loss: PeersLost) -> None:
        """Ends the run on all hosts with the error about a rank of this one; does not return."""
        self._lost_rank = loss
        threading.Event().wait()

    def wait_for_verdict(self) -> None:
        """Waits, after a lost connection, for the watch to report a missing host or rank; returns where none is found,
        and when the launcher, which restarts ranks after a death, ends this one. For the main thread."""
        ended = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
        ended.wait(self._limit + 3 * self._pause)

    # ---- the first thread ---------------------------------------------------------------------------------------

    def _exchange(self) -> None:
        last, pause = time.monotonic(), FIRST_PAUSE_AT_THE_END_S
        while not self._over:
            # torch's errors of the network and of the store.
            with contextlib.suppress(RuntimeError):
                store, self._store = self._store or self._reconnect(), None
                if store is not None:
                    now = time.monotonic()
                    self._look(store, min(now - last, 2 * self._pause))
                    last, self._answered, self._store = now, self._awake, store
            if self._leaving.wait(self._pause):
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_AT_THE_END_S, self._pause)

    def _look(self, store: Store, since_last: float) -> None:
        store.add(counter_of(self._mine), 1)
        counts = store.multi_get([counter_of(place) for place in self._counts])
        for place, count in zip(self._counts, counts, strict=True):
            self._silent[place] = self._silent[place] + since_last if count == self._counts[place] else 0.0
            self._counts[place] = count
        if store.check(["missed"]):
            verdict = store.get("missed").decode()
            self._end(PeersLost(self._miss(int(verdict)) if verdict.isdecimal() else verdict))
        if self._lost_rank is not None:
            store.set("missed", str(self._lost_rank))
            self._end(self._lost_rank)
        for place, silent in self._silent.items():
            if silent > self._limit:
                store.set("missed", str(place))
                self._end(PeersLost(self._miss(place)))
        if self._leaving.is_set() and not self._over:
            self._say_goodbye(store)

    def _say_goodbye(self, store: Store) -> None:
        """Leaves in two steps, because rank 0 may hold the store: it leaves when all others know that they may."""
        rank, others = self._meeting.rank, range(1, self._meeting.world_size)
        store.set(f"rank {rank} leaves", "1")
        if rank == 0 and store.check([f"rank {other} leaves" for other in others]):
            store.set("all leave", "1")
            deadline = time.monotonic() + self._limit
            while not store.check([f"rank {other} left" for other in others]) and time.monotonic() < deadline:
                self._answered = self._awake
                time.sleep(FIRST_PAUSE_AT_THE_END_S)
            self._all_left.set()
        elif rank != 0 and store.check(["all leave"]):
            store.set(f"rank {rank} left", "1")
            self._all_left.set()

    def _connect(self) -> Store:
        """A separate connection: the process group's may be busy, or wait for a key, on another thread."""
        meeting = self._meeting
        store = TCPStore(
            meeting.address,
            meeting.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(1.0, self._limit / 2)),
        )
        return PrefixStore(f"{meeting.prefix}/watch", store)

    def _reconnect(self) -> Store | None:
        """Reconnects to the same store: another run's, at the same address, has no counter for this host."""
        try:
            # torch's client would print a page about every failed attempt.
            socket.create_connection((self._meeting.address, self._meeting.port), timeout=self._pause).close()
        except OSError:
            return None
        store = self._connect()
        return store if store.check([counter_of(self._mine)]) else None

    # ---- the second thread --------------------------------------------------------------------------------------

    def _judge_store(self) -> None:
        last = time.monotonic()
        while not self._over and self._exchanging.is_alive():
            time.sleep(self._pause)
            now = time.monotonic()
            self._awake += min(now - last, 2 * self._pause)
            last = now
            if self._awake - self._answered > self._limit:
                self._end(PeersLost(self._endpoint_is_gone()))

    # ---- the end ------------------------------------------------------------------------------------------------

    def _endpoint_is_gone(self) -> str:
        endpoint = f"{self._meeting.address}:{self._meeting.port}"
        return (
            f"the rendezvous endpoint {endpoint} has not answered {self._hosts[self._mine]} for {self._limit:g} s: "
            f"that host (rank 0 is on {self._hosts[0].name}) or the network to it is down"
        )

    def _miss(self, place: int) -> str:
        if place == self._mine:
            return (
                f"the other hosts have not heard from {self._hosts[place]} for {self._limit:g} s and have ended the "
                f"run: this host was suspended, or lost its network"
            )
        return (
            f"no sign of {self._hosts[place]} for {self._limit:g} s: that host, its processes or the network to it are "
            f"down"
        )

    def _end(self, loss: PeersLost) -> None:
        with self._lock:
            if self._over:
                return
            self._over = self._ending = True
        speaker = threading.Thread(target=self._on_loss, args=(loss,), daemon=True)
        speaker.start()
        # A rank that leaves takes its connections, and perhaps the store, with it: first the others read the verdict.
        time.sleep(2 * self._pause)
        speaker.join(SAY_WITHIN_S)
        os._exit(EXIT_FAILURE)
