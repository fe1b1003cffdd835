"""How ``hft-megatron doctor`` shows what it found: a table for people, and JSON."""

import json
from textwrap import wrap

from hft_megatron.training.doctor.findings import Diagnosis, Row

LINE_WIDTH = 120
"""Fixed, so that reports can be compared."""


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """A line per finding, with what to do below where it isn't ok, and the count of both kinds at the end."""
    statuses = [row.finding.status for row in diagnosis.rows]
    status_width = max(len(status) for status in statuses)
    what_width = max(len(row.finding.what) for row in diagnosis.rows)
    lines = [diagnosis.setting, ""]
    for row in diagnosis.rows:
        lines += _lines(row, f"{row.finding.status:<{status_width}}  {row.finding.what:<{what_width}}  ")
    counts = f"{statuses.count('wrong')} wrong, {_counted(statuses.count('warning'), 'warning')}"
    return "\n".join([*lines, "", counts])


def diagnosis_json(diagnosis: Diagnosis) -> str:
    """``ok``, the layout, and ``checks``: ``what``, ``value``, ``status``, ``fix``, and ``where`` ranks differ."""
    return json.dumps(diagnosis.to_dict(), indent=1)


def _lines(row: Row, label: str) -> list[str]:
    value = f"{row.finding.value} ({row.where})" if row.where else row.finding.value
    indent = " " * len(label)
    lines = wrap(value, LINE_WIDTH, initial_indent=label, subsequent_indent=indent, break_long_words=False)
    if row.finding.fix is not None:
        lines += wrap(
            row.finding.fix, LINE_WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False
        )
    return lines


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
