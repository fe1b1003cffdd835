"""The page for contributors: what it names is there. Run: pytest tests/docs/test_architecture_page.py"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.test_architecture import ROWS, row_of

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "hft_megatron"
PAGE = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`((?:\w+/)*\w+\.(?:py|md))(?::([\w.]+))?`")
"""A file, and perhaps a symbol in it: ``hft/rules.py:RULES``."""


def symbols_of(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Functions, classes with their members, and variables of a module."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield f"{prefix}{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from symbols_of(node.body, f"{prefix}{node.name}.")
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        yield from (f"{prefix}{target.id}" for target in targets if isinstance(target, ast.Name))


def is_there(file: str, symbol: str) -> bool:
    path = next((folder / file for folder in (PACKAGE, REPOSITORY) if (folder / file).is_file()), None)
    if path is None or not symbol:
        return path is not None
    return symbol in symbols_of(ast.parse(path.read_text(encoding="utf-8")).body)


def test_every_file_and_symbol_that_the_page_names_is_there() -> None:
    named = [(file, symbol) for file, symbol in NAMED.findall(PAGE) if file != "path.py" and "NAME" not in file]
    assert len(named) > 80
    assert [f"{file}:{symbol}" for file, symbol in named if not is_there(file, symbol)] == []


def test_the_tree_has_every_part_of_the_package_from_the_top_down() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \|", PAGE.split("| part |")[1].split("\n\n")[0], re.MULTILINE)
    shown = [part.rstrip("/").removesuffix(".py") for row in rows for part in re.findall(r"`([\w./]+)`", row)]
    assert sorted(shown) == sorted(part for row in ROWS for part in row if not part.startswith("__"))
    assert [row_of(part) for part in shown] == sorted(row_of(part) for part in shown)
