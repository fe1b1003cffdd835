"""Rows about process groups: how fast they are, which one lags behind, and whether their sums are right. Pure."""

from collections.abc import Iterator, Sequence
from statistics import median_low

from hft_megatron.optimizer.rank_memory import in_bytes
from hft_megatron.training.doctor.findings import Finding, GroupSpeed, RankReport, Row, ranks_in_words

SLOW = 3.0
"""A group that takes this many times the median of its kind is reported: the others wait for it in every step."""


def speed_findings(reports: Sequence[RankReport]) -> Iterator[Row]:
    """One row for each kind of group that has more than one rank, with the time of the slowest group."""
    kinds = dict.fromkeys(speed.kind for report in reports for speed in report.speeds)
    for kind in kinds:
        yield Row(finding=_of_kind(f"all-reduce, {kind}", _slowest_view(reports, kind), reports))
    if not kinds:
        yield Row(finding=Finding(what="all-reduce", value="every group has one rank: nothing is sent"))
    for group in _slowest_view(reports, "tensor"):
        hosts = {reports[rank].host for rank in group.ranks}
        if len(hosts) > 1:
            fix = (
                "Tensor-parallel ranks talk in every layer, and between hosts that is slow: give "
                "--tensor-model-parallel-size at most the ranks of a host, and --pipeline-model-parallel-size the rest."
            )
            value = f"one of {len(group.ranks)} ranks lies on {len(hosts)} hosts"
            yield Row(finding=Finding(what="tensor groups", value=value, status="warning", fix=fix))
            return


def _slowest_view(reports: Sequence[RankReport], kind: str) -> list[GroupSpeed]:
    """Each group of a kind once, as its slowest rank saw it; wrong where any rank saw a wrong sum."""
    groups: dict[tuple[int, ...], list[GroupSpeed]] = {}
    for report in reports:
        for speed in report.speeds:
            if speed.kind == kind:
                groups.setdefault(speed.ranks, []).append(speed)
    return [min(seen, key=lambda speed: (speed.is_right, -speed.seconds)) for seen in groups.values()]


def _of_kind(what: str, groups: Sequence[GroupSpeed], reports: Sequence[RankReport]) -> Finding:
    slowest = max(groups, key=lambda group: group.seconds)
    value = (
        f"{in_bytes(slowest.message_bytes)} among {len(slowest.ranks)} ranks in {slowest.seconds * 1e3:.1f} ms, "
        f"{in_bytes(slowest.bytes_per_second)}/s"
    )
    if len(groups) > 1:
        value += f" in the slowest of {len(groups)} groups"
    for group in groups:
        if not group.is_right:
            fix = (
                f"The sum over {_members(group, reports)} came out wrong, so training would too: "
                f"a device or the network between them damages data; leave them out and have them tested."
            )
            return Finding(what=what, value=value, status="wrong", fix=fix)
    usual = median_low([group.seconds for group in groups])
    if slowest.seconds > SLOW * usual:
        fix = (
            f"The group of {_members(slowest, reports)} takes {slowest.seconds / usual:.1f} times as long as usual, "
            f"and all others wait for it: look at the links and the load of these hosts."
        )
        return Finding(what=what, value=value, status="warning", fix=fix)
    return Finding(what=what, value=value)


def _members(group: GroupSpeed, reports: Sequence[RankReport]) -> str:
    return ranks_in_words([reports[rank] for rank in group.ranks])
