import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankPool, RankPools, RanksFailed


def run_rank_and_sum(offset: int) -> dict[str, int]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return {"rank": dist.get_rank(), "sum": int(total), "pid": os.getpid()}


def run_fail_differently() -> torch.Tensor:
    if dist.get_rank() == 0:
        raise ValueError("no luck on rank 0")
    return torch.ones(1)


def run_fail_before_collective() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no luck on rank 1")
    dist.barrier()


def run_hang() -> None:
    if dist.get_rank() == 1:
        time.sleep(3600)
    dist.barrier()


def run_die() -> None:
    if dist.get_rank() == 0:
        print("famous last words", file=sys.stderr, flush=True)
        os._exit(7)


def run_make_group() -> int:
    dist.new_group([0, 1])
    return len(dist.distributed_c10d._world.pg_map)


def run_print_and_return() -> float:
    print("printed by a rank")
    return 0.1 + 0.2


def test_every_rank_runs_the_body_and_returns_its_value(ranks: RankPools) -> None:
    values = ranks(2).run(run_rank_and_sum, offset=10)
    assert [value["rank"] for value in values] == [0, 1]
    assert [value["sum"] for value in values] == [21, 21]


STUCK = """
import os, time
from pathlib import Path

def wait_for_nobody():
    Path(__file__).with_name(f"rank-{os.environ['RANK']}").touch()
    time.sleep(3600)

wait_for_nobody()
"""


def test_ranks_that_never_come_show_where_each_of_their_processes_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stuck = tmp_path / "stuck.py"
    stuck.write_text(STUCK)
    monkeypatch.setattr("tests.support.ranks.WORKER", stuck)

    def give_up_once_both_wait() -> None:
        while len(list(tmp_path.glob("rank-*"))) < 2:
            time.sleep(0.05)
        monkeypatch.setattr("tests.support.ranks.START_TIMEOUT", 0.0)

    threading.Thread(target=give_up_once_both_wait, daemon=True).start()
    pool = RankPool(2)
    with pytest.raises(RanksFailed, match="2 ranks did not start") as failure:
        pool.run(run_print_and_return)
    assert str(failure.value).count("in wait_for_nobody") == 2
    assert "in launch_agent" in str(failure.value)


def test_ranks_are_kept_between_cases(ranks: RankPools) -> None:
    first = ranks(2).run(run_rank_and_sum, offset=0)
    again = ranks(2).run("tests.support.test_ranks:run_rank_and_sum", offset=0)
    assert first == again


def test_process_groups_of_a_case_are_gone_in_the_next_one(ranks: RankPools) -> None:
    assert ranks(2).run(run_make_group) == ranks(2).run(run_make_group) == [2, 2]


def test_floats_keep_every_digit_and_output_is_shown(ranks: RankPools, capsys: pytest.CaptureFixture[str]) -> None:
    assert ranks(2).run(run_print_and_return) == [0.1 + 0.2] * 2
    assert "printed by a rank" in capsys.readouterr().out


@pytest.fixture(scope="module")
def doomed() -> Iterator[RankPool]:
    """A pool of its own, so that the failures here don't cost the other tests their ranks."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.mark.slow
def test_every_failing_rank_is_shown_and_a_value_that_is_not_json_is_a_failure(doomed: RankPool) -> None:
    doomed.run(run_rank_and_sum, offset=0)  # Now ranks have imported this module: a late one would be cut.
    with pytest.raises(RanksFailed) as failure:
        doomed.run(run_fail_differently)
    assert "no luck on rank 0" in failure.value.tracebacks[0]
    assert "not JSON serializable" in failure.value.tracebacks[1]
    assert all(text in str(failure.value) for text in failure.value.tracebacks.values())


@pytest.mark.slow
def test_a_rank_stuck_behind_a_failed_one_is_cut_and_the_next_run_works(doomed: RankPool) -> None:
    doomed.run(run_rank_and_sum, offset=0)
    with pytest.raises(RanksFailed) as failure:
        doomed.run(run_fail_before_collective)
    assert list(failure.value.tracebacks) == [1]
    assert "run_fail_before_collective" in failure.value.stacks[0]
    assert [value["sum"] for value in doomed.run(run_rank_and_sum, offset=0)] == [1, 1]


@pytest.mark.slow
def test_a_hang_is_cut_at_the_time_out_with_the_stack_of_every_rank(doomed: RankPool) -> None:
    with pytest.raises(RanksFailed, match=r"did not finish in 8 s on ranks .0, 1. of 2") as failure:
        doomed.run(run_hang, timeout=8)
    assert sorted(failure.value.stacks) == [0, 1]
    assert all("run_hang" in stack for stack in failure.value.stacks.values())


@pytest.mark.slow
def test_a_rank_that_dies_is_reported_with_its_last_output(doomed: RankPool) -> None:
    with pytest.raises(RanksFailed, match="famous last words") as failure:
        doomed.run(run_die)
    assert 0 in failure.value.tracebacks
