"""A person sees documents per second and the time left. Run: pytest tests/data/preprocessed/test_progress.py"""

import sys
from typing import Any

import pytest

from hft_megatron.data.preprocessed import making
from hft_megatron.data.preprocessed.making import ProgressReport


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


def report(said: list[str]) -> ProgressReport:
    return ProgressReport(total=1000, position=200, documents=50, log_interval=100, announce=said.append)


def test_a_log_has_a_line_per_interval_that_counts_from_where_the_work_went_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, said = Clock(), list[str]()
    monkeypatch.setattr(making, "time", clock)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    shown = report(said)
    for now, position, documents in ((101.0, 300, 100), (102.0, 400, 150), (103.0, 500, 200), (104.0, 600, 260)):
        clock.now = now
        shown.update(position, documents)
    shown.close()
    assert said == [
        "150 documents, 50 documents/s, 40.0% of the input, 0:00:06 left",
        "260 documents, 52 documents/s, 60.0% of the input, 0:00:04 left",
    ]


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown: Any = report(said)
    shown.update(600, 150)
    shown._bar.refresh()
    shown.close()
    bar = capsys.readouterr().err
    assert " 60%|" in bar
    assert "150 documents, " in bar
    assert " documents/s, " in bar
    assert " left" in bar
    assert not said
