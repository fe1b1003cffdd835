"""The page for contributors: its tree is the package's. Run: pytest tests/docs/test_architecture_page.py"""

import re
from pathlib import Path

from tests.test_architecture import ROWS, row_of

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")


def test_the_tree_has_every_part_of_the_package_from_the_top_down() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \|", PAGE.split("| part |")[1].split("\n\n")[0], re.MULTILINE)
    shown = [part.rstrip("/").removesuffix(".py") for row in rows for part in re.findall(r"`([\w./]+)`", row)]
    assert sorted(shown) == sorted(part for row in ROWS for part in row if not part.startswith("__"))
    assert [row_of(part) for part in shown] == sorted(row_of(part) for part in shown)
