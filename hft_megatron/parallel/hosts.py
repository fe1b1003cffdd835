"""Which ranks are on which host. Pure: no torch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine, or what a launcher calls a node, and the ranks that run on it."""

    name: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        """``ranks 0 to 7 on node-a``."""
        return f"{numbers_in_words(self.ranks)} on {self.name}"


def hosts_of(places: Sequence[tuple[str, str]]) -> tuple[Host, ...]:
    """The hosts in the order of their first rank.

    ``places`` has for every rank the name of its machine and its node's number by the launcher, because two nodes may
    have one name, as containers of one image do.
    """
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault(place, []).append(rank)
    return tuple(Host(name=place[0], ranks=tuple(members)) for place, members in ranks.items())


def numbers_in_words(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 0 to 3, 6``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    listed = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {listed}"
