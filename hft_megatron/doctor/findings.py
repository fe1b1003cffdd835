"""Findings of preflight checks, as values, and the time limit of a check."""

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from hft_megatron.errors import EXIT_FAILURE, UserError
from hft_megatron.parallel.launch import numbers_in_words

Status = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Result of one check. Never holds a value that could be a secret."""

    what: str
    value: str
    status: Status = "ok"
    fix: str | None = None
    """One sentence with the problem and its fix; None where it is ok."""
    same_everywhere: bool = False
    """True if ranks with different values cannot train together."""

    def __post_init__(self) -> None:
        assert (self.status == "ok") == (self.fix is None), "a finding has a fix exactly when it is not ok"


@dataclass(frozen=True, kw_only=True)
class GroupSpeed:
    """Speed of the ranks of one process group, as one of them measured it."""

    kind: str
    """Kind of the group: tensor, pipeline or data."""
    ranks: tuple[int, ...]
    message_bytes: int
    seconds: float
    """Time of one all-reduce, the median of several."""
    is_right: bool
    """True if the sum was correct."""

    @property
    def bytes_per_second(self) -> float:
        """Bandwidth of every link: bytes / seconds x 2 (n - 1) / n for n ranks, the "bus bandwidth" of nccl-tests (its
        doc/PERFORMANCE.md), which doesn't depend on n and can be compared with the hardware's."""
        return self.message_bytes / self.seconds * 2 * (len(self.ranks) - 1) / len(self.ranks)


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """Everything that one rank reports."""

    rank: int
    host: str
    findings: tuple[Finding, ...] = ()
    speeds: tuple[GroupSpeed, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """A finding, and the ranks that made it where others differ."""

    finding: Finding
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Report of the command."""

    setting: str
    """Ranks and layout in words."""
    rows: tuple[Row, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The setting in numbers."""

    @property
    def wrong(self) -> tuple[str, ...]:
        """Names of the failed checks, each once."""
        return tuple(dict.fromkeys(row.finding.what for row in self.rows if row.finding.status == "wrong"))

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        rows = []
        for row in self.rows:
            record = {**asdict(row.finding), "where": row.where}
            del record["same_everywhere"]
            rows.append(record)
        return {"ok": not self.wrong, **self.facts, "checks": rows}


def finding_of(what: str, value: str, look: Callable[[], str | None]) -> Finding:
    """A finding with the result of ``look`` (``value`` if None), or ``value`` and the sentence of its UserError."""
    try:
        return Finding(what=what, value=look() or value)
    except UserError as error:
        return Finding(what=what, value=value, status="wrong", fix=str(error))


def merged(reports: Sequence[RankReport]) -> Iterator[Row]:
    """One row for a finding that all ranks share, else one per value with the ranks and hosts that have it.

    For values that must be the same everywhere, all but that of most ranks (on a tie, of the lowest) are wrong.
    """
    order = dict.fromkeys(finding.what for report in reports for finding in report.findings)
    for what in order:
        holders: dict[Finding, list[RankReport]] = {}
        for report in reports:
            for finding in report.findings:
                if finding.what == what:
                    holders.setdefault(finding, []).append(report)
        values = Counter({finding: len(ranks) for finding, ranks in holders.items()})
        common = max(values, key=values.__getitem__)
        for finding, ranks in holders.items():
            where = ranks_in_words(ranks) if len(holders) > 1 else ""
            if finding.same_everywhere and finding.value != common.value:
                fix = f"{ranks_in_words(holders[common])} found {common.value}: all ranks must have the same."
                if finding.fix is not None:
                    fix = f"{fix} {finding.fix}"
                finding = replace(finding, status="wrong", fix=fix)
            yield Row(finding=finding, where=where)


def ranks_in_words(reports: Sequence[RankReport]) -> str:
    """``ranks 0 to 3, 6 on host-a, rank 8 on host-b``."""
    hosts: dict[str, list[int]] = {}
    for report in reports:
        hosts.setdefault(report.host, []).append(report.rank)
    return ", ".join(f"{numbers_in_words(ranks)} on {host}" for host, ranks in hosts.items())


@dataclass(frozen=True, kw_only=True)
class TimeLimit:
    """Time limit for calls into a driver, a network disk or a collective, which no exception can interrupt."""

    seconds: float
    on_expiry: Callable[[str], None]
    """Called on another thread with the name of the check that did not return; the process then ends with
    ``EXIT_FAILURE``."""

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Limits the time within it."""
        expired = threading.Event()
        timer = threading.Timer(self.seconds, self._expire, (what, expired))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if expired.is_set():
                threading.Event().wait()  # The timer thread is reporting and will exit the process.

    def _expire(self, what: str, expired: threading.Event) -> None:
        expired.set()
        try:
            self.on_expiry(what)
        finally:
            os._exit(EXIT_FAILURE)
