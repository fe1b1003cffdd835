"""What ranks found, put together. Run: pytest tests/doctor/test_findings.py"""

import pytest

from hft_megatron.doctor.findings import Diagnosis, Finding, RankReport, Row, finding_of, merged
from hft_megatron.errors import UserError


def reports(*findings: Finding, hosts: str = "aabb") -> list[RankReport]:
    """One finding per rank, two ranks on each of two hosts."""
    return [
        RankReport(rank=rank, host=host, findings=(finding,))
        for rank, (finding, host) in enumerate(zip(findings, hosts, strict=True))
    ]


def torch_of(version: str) -> Finding:
    return Finding(what="torch", value=version, same_everywhere=True)


def test_what_all_ranks_found_alike_is_one_row_without_ranks() -> None:
    assert list(merged(reports(*[torch_of("2.13")] * 4))) == [Row(finding=torch_of("2.13"))]


def test_a_rank_with_another_version_is_wrong_and_named_with_what_the_others_have() -> None:
    usual, odd = merged(reports(torch_of("2.13"), torch_of("2.13"), torch_of("2.12"), torch_of("2.13")))
    assert (usual.finding.status, usual.where) == ("ok", "ranks 0 to 1 on a, rank 3 on b")
    assert (odd.finding.status, odd.finding.value, odd.where) == ("wrong", "2.12", "rank 2 on b")
    assert odd.finding.fix == "ranks 0 to 1 on a, rank 3 on b found 2.13: all ranks must have the same."


def test_on_a_tie_the_lowest_rank_is_believed() -> None:
    usual, odd = merged(reports(torch_of("1"), torch_of("2"), torch_of("1"), torch_of("2")))
    assert (usual.finding.value, odd.finding.value, odd.finding.status) == ("1", "2", "wrong")


def test_what_may_differ_has_a_row_per_value_and_stays_ok() -> None:
    free = [Finding(what="free", value=value) for value in ("1 GB", "2 GB", "2 GB", "2 GB")]
    assert [(row.finding.status, row.where) for row in merged(reports(*free))] == [
        ("ok", "rank 0 on a"),
        ("ok", "rank 1 on a, ranks 2 to 3 on b"),
    ]


def test_a_row_that_one_rank_of_a_host_reports_names_nobody_while_there_is_one_value() -> None:
    one = [RankReport(rank=0, host="a", findings=(torch_of("1"),)), RankReport(rank=1, host="a")]
    assert list(merged(one)) == [Row(finding=torch_of("1"))]


def test_a_users_mistake_becomes_a_finding_with_its_sentence() -> None:
    def look() -> str:
        raise UserError("--x 1: must be 2.")

    finding = finding_of("x", "here", look)
    assert (finding.value, finding.status, finding.fix) == ("here", "wrong", "--x 1: must be 2.")


def test_a_finding_that_is_not_ok_must_say_what_to_do() -> None:
    with pytest.raises(AssertionError, match="has a fix"):
        Finding(what="x", value="y", status="warning")


def test_warnings_leave_a_diagnosis_ok_and_what_is_wrong_is_named_once() -> None:
    warning = Row(finding=Finding(what="a", value="", status="warning", fix="Mend it."))
    wrong = Row(finding=Finding(what="b", value="", status="wrong", fix="Mend it."))
    assert Diagnosis(setting="", rows=(warning,)).to_dict()["ok"]
    diagnosis = Diagnosis(setting="", rows=(warning, wrong, wrong))
    assert diagnosis.wrong == ("b",)
    assert not diagnosis.to_dict()["ok"]
