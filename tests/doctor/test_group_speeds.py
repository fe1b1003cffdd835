"""Rows about process groups. Run: pytest tests/doctor/test_group_speeds.py"""

import pytest

from hft_megatron.doctor.findings import GroupSpeed, RankReport, Row
from hft_megatron.doctor.measurements import speed_findings


def speed(kind: str, *ranks: int, ms: float, is_right: bool = True) -> GroupSpeed:
    return GroupSpeed(kind=kind, ranks=ranks, message_bytes=8_000_000, seconds=ms / 1e3, is_right=is_right)


def rows(*groups: GroupSpeed, hosts: str = "aaaa") -> list[Row]:
    """What is said about groups that each of their ranks saw alike."""
    return list(
        speed_findings(
            [
                RankReport(rank=rank, host=host, speeds=tuple(group for group in groups if rank in group.ranks))
                for rank, host in enumerate(hosts)
            ]
        )
    )


def test_bandwidth_is_what_a_link_carries() -> None:
    # Of n ranks, each sends and receives (n - 1) / n of the message twice.
    assert speed("data", 0, 1, ms=1).bytes_per_second == pytest.approx(8e9)
    assert speed("data", 0, 1, 2, 3, ms=1).bytes_per_second == pytest.approx(12e9)


def test_a_kind_of_group_is_one_row_with_its_slowest_group() -> None:
    [tensor, data] = rows(
        speed("tensor", 0, 1, ms=2), speed("tensor", 2, 3, ms=4), speed("data", 0, 2, ms=1), speed("data", 1, 3, ms=1)
    )
    assert tensor.finding.what == "all-reduce, tensor"
    assert tensor.finding.value == "8.0 MB among 2 ranks in 4.0 ms, 2.0 GB/s in the slowest of 2 groups"
    assert (tensor.finding.status, data.finding.status) == ("ok", "ok")


def test_groups_of_one_rank_send_nothing() -> None:
    [row] = rows()
    assert row.finding.value == "every group has one rank: nothing is sent"


def test_a_group_that_lags_behind_the_others_of_its_kind_is_named() -> None:
    [row] = rows(speed("data", 0, 2, ms=1), speed("data", 1, 3, ms=5), hosts="aabc")
    assert row.finding.status == "warning"
    assert "The group of rank 1 on a, rank 3 on c takes 5.0 times as long as usual" in str(row.finding.fix)


def test_a_wrong_sum_is_wrong_even_where_one_rank_alone_saw_it() -> None:
    seen = [speed("data", 0, 1, ms=9), speed("data", 0, 1, ms=1, is_right=False)]
    [row] = speed_findings([RankReport(rank=rank, host="a", speeds=(one,)) for rank, one in enumerate(seen)])
    assert row.finding.status == "wrong"
    assert "The sum over ranks 0 to 1 on a is wrong" in str(row.finding.fix)


def test_tensor_ranks_on_several_hosts_are_a_warning_and_data_ranks_are_none() -> None:
    assert [row.finding.status for row in rows(speed("data", 0, 1, ms=1), hosts="ab")] == ["ok"]
    _, row = rows(speed("tensor", 0, 1, ms=1), hosts="ab")
    assert (row.finding.what, row.finding.status) == ("tensor groups", "warning")
