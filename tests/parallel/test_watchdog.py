"""Who is missed and who is not, over a real store. Run: pytest tests/parallel/test_watchdog.py"""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from hft_megatron.errors import PeersLost
from hft_megatron.parallel import watchdog
from hft_megatron.parallel.launch import Host
from hft_megatron.parallel.meeting import Meeting
from hft_megatron.parallel.watchdog import Watchdog, limit_of
from tests.support.ranks import REPOSITORY
from tests.support.relay import Relay

LIMIT_S = 0.8
SOON_S = 2 * LIMIT_S
"""Long enough for any watch to have spoken."""
PATIENCE_S = 60.0
"""For the ends of threads, however slow the machine is."""
HOSTS = (Host(name="node-a", ranks=(0,)), Host(name="node-b", ranks=(1, 2)), Host(name="node-c", ranks=(3,)))


class Watch:
    """All ranks of ``HOSTS`` as threads of this process; ends of processes are noted."""

    def __init__(self) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.said: dict[int, str] = {}
        self.ended: list[int] = []
        self.relays = {rank: Relay(self.store.port) for rank in range(4)}
        self.dogs = {rank: self._dog(rank, relay.port) for rank, relay in self.relays.items()}
        for dog in self.dogs.values():
            dog.connect()
        for dog in self.dogs.values():
            dog.start()

    def _dog(self, rank: int, port: int) -> Watchdog:
        meeting = Meeting(
            address="127.0.0.1",
            port=port,
            minutes=1,
            rank=rank,
            world_size=4,
            store=PrefixStore("start", self.store),
            prefix="start",
        )
        return Watchdog(meeting, HOSTS, lambda loss: self.said.__setitem__(rank, str(loss)), limit_s=LIMIT_S)

    def end_process(self, code: int) -> None:
        assert code == 1
        self.ended.append(code)

    def wait_until_said_by(self, *ranks: int) -> set[str]:
        """What these ranks say, and that their processes end."""
        deadline = time.monotonic() + 15 * LIMIT_S
        while len(self.ended) < len(ranks) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert set(self.said) == set(ranks)
        assert len(self.ended) == len(ranks)
        return {self.said[rank] for rank in ranks}

    def close(self) -> None:
        for dog in self.dogs.values():
            dog._over = True
            dog._leaving.set()
        for relay in self.relays.values():
            relay.close()
        # One that comes back from torch while Python shuts down would abort the process.
        for dog in self.dogs.values():
            for thread in (dog._exchanging, dog._judging):
                thread.join(PATIENCE_S)
                assert not thread.is_alive()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    watch = Watch()
    monkeypatch.setattr(watchdog.os, "_exit", watch.end_process)
    yield watch
    watch.close()


def test_a_host_whose_ranks_are_all_silent_is_named_on_every_other_host(watch: Watch) -> None:
    for rank in (1, 2):
        watch.dogs[rank].abandon()
    (sentence,) = watch.wait_until_said_by(0, 3)
    assert sentence.startswith(f"no sign of ranks 1 to 2 on node-b for {LIMIT_S:g} s")


def test_a_host_of_which_one_rank_still_counts_is_not_missed(watch: Watch) -> None:
    watch.dogs[2].abandon()
    time.sleep(SOON_S)
    assert watch.said == {}


def test_a_rank_that_its_host_has_lost_is_named_on_every_host(watch: Watch) -> None:
    loss = PeersLost("rank 2 on node-b was ended", speaks=True)
    threading.Thread(target=watch.dogs[1].tell, args=(loss,), daemon=True).start()
    assert watch.wait_until_said_by(0, 1, 2, 3) == {str(loss)}


def test_the_first_host_is_missed_by_all_others(watch: Watch) -> None:
    watch.dogs[0].abandon()
    (sentence,) = watch.wait_until_said_by(1, 2, 3)
    assert sentence.startswith("no sign of rank 0 on node-a")


def test_a_host_that_is_cut_off_names_the_endpoint_and_is_named_by_the_others(watch: Watch) -> None:
    watch.relays[3].hold()
    watch.wait_until_said_by(0, 1, 2, 3)
    assert watch.said[3].startswith(
        f"the rendezvous endpoint 127.0.0.1:{watch.relays[3].port} has not answered rank 3 on node-c for {LIMIT_S:g} "
        "s: that host (rank 0 is on node-a)"
    )
    assert all(watch.said[rank].startswith("no sign of rank 3 on node-c") for rank in (0, 1, 2))


def test_a_store_that_is_silent_for_less_than_the_limit_is_waited_for(watch: Watch) -> None:
    for _ in range(2):
        for relay in watch.relays.values():
            relay.hold()
        time.sleep(0.6 * LIMIT_S)
        for relay in watch.relays.values():
            relay.let_go()
        time.sleep(0.3 * LIMIT_S)
    time.sleep(LIMIT_S)
    assert watch.said == {}


def test_a_connection_that_breaks_is_made_anew(watch: Watch) -> None:
    watch.relays[0].drop()
    watch.relays[3].drop()
    time.sleep(SOON_S)
    assert watch.said == {}


def test_a_store_that_ends_is_named_by_its_endpoint(watch: Watch) -> None:
    for relay in watch.relays.values():
        relay.close()
    sentences = watch.wait_until_said_by(0, 1, 2, 3)
    assert all(sentence.startswith("the rendezvous endpoint 127.0.0.1:") for sentence in sentences)


def test_another_runs_store_at_the_same_address_is_not_taken_for_the_old_one(watch: Watch) -> None:
    other = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    watch.relays[3]._target = other.port
    watch.relays[3].drop()
    watch.wait_until_said_by(0, 1, 2, 3)
    assert watch.said[3].startswith("the rendezvous endpoint")


def test_nobody_leaves_before_all_do_and_then_nobody_is_missed(watch: Watch) -> None:
    early = [threading.Thread(target=watch.dogs[rank].leave) for rank in (0, 1, 3)]
    for thread in early:
        thread.start()
    time.sleep(SOON_S)
    assert all(thread.is_alive() for thread in early)
    watch.dogs[2].leave()
    for thread in early:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    time.sleep(SOON_S)
    assert watch.said == {}


def test_a_host_that_is_lost_while_others_wait_to_leave_is_named(watch: Watch) -> None:
    leaving = threading.Thread(target=watch.dogs[0].leave, daemon=True)
    leaving.start()
    watch.dogs[3].abandon()
    (sentence,) = watch.wait_until_said_by(0, 1, 2)
    assert "rank 3 on node-c" in sentence


STOPPED = """
import time
from tests.parallel.test_watchdog import SOON_S, Watch
watch = Watch()
print("watching", flush=True)
time.sleep(2 * SOON_S)
print(watch.said, flush=True)
watch.close()
"""


@pytest.mark.slow
def test_what_was_stopped_blames_nobody_for_the_time() -> None:
    """With all ranks in one process: none of them has counted for much longer than the limit."""
    process = subprocess.Popen([sys.executable, "-c", STOPPED], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "watching\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(SOON_S)
    process.send_signal(signal.SIGCONT)
    assert process.stdout.read() == "{}\n"
    assert process.wait(30) == 0


def test_the_limit_leaves_room_before_the_collectives_give_up() -> None:
    assert limit_of(0.25) == 7.5
    assert limit_of(1) == 30.0
    assert limit_of(10) == limit_of(600) == 120.0
    assert all(timedelta(seconds=limit_of(minutes)) <= timedelta(minutes=minutes) / 2 for minutes in (0.1, 1, 2, 3, 10))
