"""Which ranks are on which host. Run: pytest tests/parallel/test_hosts.py"""

import pytest

from hft_megatron.parallel.launch import hosts_of, numbers_in_words


def test_hosts_are_listed_with_their_ranks() -> None:
    places = [("node-a", "0"), ("node-a", "0"), ("node-b", "1"), ("node-b", "1"), ("node-c", "2")]
    assert [str(host) for host in hosts_of(places)] == [
        "ranks 0 to 1 on node-a",
        "ranks 2 to 3 on node-b",
        "rank 4 on node-c",
    ]


def test_two_nodes_of_one_name_are_two_hosts() -> None:
    hosts = hosts_of([("trainer", "0"), ("trainer", "1")])
    assert [host.ranks for host in hosts] == [(0,), (1,)]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [([3], "rank 3"), ([0, 1, 2], "ranks 0 to 2"), ([8, 0, 1, 5], "ranks 0 to 1, 5, 8")],
)
def test_ranks_in_a_row_are_written_from_to(ranks: list[int], words: str) -> None:
    assert numbers_in_words(ranks) == words
