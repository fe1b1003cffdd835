"""Ranks that meet in a store that may hold what dead ones left. Run: pytest tests/parallel/test_meeting.py"""

import threading
import time

import pytest
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from hft_megatron.errors import PeersLost
from hft_megatron.parallel.meeting import _answer, _call, meet


@pytest.fixture
def server() -> Store:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


class Starting:
    """One rank's way to a meeting, on a thread."""

    def __init__(self, server: Store, rank: int, world_size: int = 3, seconds: float = 10) -> None:
        self.name = ""
        self.failure = ""
        store = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
        arguments = (store, rank, world_size, time.monotonic() + seconds)
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self._thread.start()

    def _run(self, store: Store, rank: int, world_size: int, deadline: float) -> None:
        try:
            self.name = (_call if rank == 0 else _answer)(store, rank, world_size, deadline)
        except RuntimeError as error:
            self.failure = str(error)

    def end(self) -> "Starting":
        self._thread.join(15)
        assert not self._thread.is_alive()
        return self


def names(*starting: Starting) -> set[str]:
    return {one.end().name for one in starting}


def test_all_ranks_of_a_start_get_one_name_and_the_next_start_another(server: Store) -> None:
    (first,) = names(*(Starting(server, rank) for rank in (2, 1, 0)))
    (second,) = names(*(Starting(server, rank) for rank in (1, 2, 0)))
    assert "" not in (first, second)
    assert first != second


def test_a_rank_that_comes_back_waits_for_rank_0_to_come_back(server: Store) -> None:
    (first,) = names(*(Starting(server, rank) for rank in (0, 1, 2)))
    again = Starting(server, 2)
    time.sleep(1)
    assert again.name == ""
    (second,) = names(again, Starting(server, 0), Starting(server, 1))
    assert second not in ("", first)


def test_rank_0_that_dies_before_all_have_come_does_not_lead_the_others_astray(server: Store) -> None:
    gone = Starting(server, 0, seconds=0.5)
    early = Starting(server, 1)
    gone.end()
    (name,) = names(early, Starting(server, 2), Starting(server, 0))
    assert name.startswith("2-")


def test_rank_0_names_the_ranks_that_did_not_come(server: Store) -> None:
    lonely, other = Starting(server, 0, world_size=6, seconds=3), Starting(server, 3, world_size=6, seconds=3)
    assert lonely.end().failure == "ranks 1 to 2, 4 to 5 did not arrive"
    assert other.end().failure == "rank 0 is waiting for others"
    assert Starting(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), 1, seconds=0.5).end().failure == (
        "rank 0 did not arrive"
    )


def test_a_rendezvous_host_that_is_not_there_is_named_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    said = r"^the ranks did not all meet at .* 127\.0\.0\.1:1 within --distributed-timeout-minutes 0\.02 \("
    with pytest.raises(PeersLost, match=said):
        meet(0.02)
