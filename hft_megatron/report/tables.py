"""Tables of reports: plain text, the same on a terminal, in a pipe and in a log."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest


def table_lines(rows: Sequence[Sequence[str]], *, left: int = 1) -> Iterator[str]:
    """Yields a line per row. Columns are as wide as their longest cell, the first ``left`` of them aligned left and the
    others right; a row may end early."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    for row in rows:
        cells = (
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        )
        yield ("  " + "  ".join(cells)).rstrip()
