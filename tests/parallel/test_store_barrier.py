"""Ranks that wait for a long time do it on the store. Run: pytest tests/parallel/test_store_barrier.py"""

import os
import random
import signal
import time
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch.distributed as dist

from hft_megatron.parallel import meeting
from tests.support.ranks import RankPools, RanksFailed

TIMES = 30


def run_barriers() -> list[list[int]]:
    """How many ranks had come to each barrier when this rank left it, by the store alone."""
    store, found = dist.distributed_c10d._get_default_store(), []
    with patch.object(dist, "barrier"):
        for number in range(TIMES):
            time.sleep(random.random() / 200)
            store.add(f"came to {number}", 1)
            meeting.wait_for_all_ranks()
            found.append(store.add(f"came to {number}", 0))
    # The next case of this group of ranks has the same store.
    dist.barrier()
    for number in range(TIMES):
        store.delete_key(f"came to {number}")
    dist.barrier()
    return found


def test_nobody_leaves_a_barrier_before_the_last_one_comes(ranks: RankPools) -> None:
    assert ranks(4).run(run_barriers) == [[4] * TIMES] * 4


def run_a_late_rank() -> list[str]:
    """What rank 0 does while rank 1 has not come, which comes when rank 0 has looked three times."""
    store, done, rank = dist.distributed_c10d._get_default_store(), [], dist.get_rank()

    def pause(seconds: float) -> None:
        assert 0 < seconds <= meeting.LONGEST_PAUSE_S
        if rank == 0:
            done.append("paused")
        store.add("looks", 1)

    meeting._ranks_of_this_host()
    if rank == 1:
        while store.add("looks", 0) < 3:
            time.sleep(0.001)
    barrier = dist.barrier
    with (
        patch.object(meeting, "time", SimpleNamespace(sleep=pause)),
        patch.object(dist, "barrier", lambda: (done.append("in a collective"), barrier())),
    ):
        meeting.wait_for_all_ranks()
    store.delete_key("looks")
    return done


def test_a_rank_that_waits_is_in_no_collective_until_all_are_there(ranks: RankPools) -> None:
    early, late = ranks(2).run(run_a_late_rank)
    assert early[:3] == ["paused"] * 3
    assert early[-1] == "in a collective"
    assert early.count("in a collective") == late.count("in a collective") == 1


def run_a_death() -> None:
    # As in a run: what torchrun sends to the others then does not end them.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    meeting.wait_for_all_ranks()
    if dist.get_rank() == 1:
        os._exit(1)
    meeting.wait_for_all_ranks()


def test_a_rank_that_dies_ends_the_wait_of_the_others(ranks: RankPools) -> None:
    with pytest.raises(RanksFailed) as caught:
        ranks(2).run(run_a_death)
    assert "PeersLost: rank 1 (process " in caught.value.tracebacks[0]
