"""What README.md, docs/ and the other pages name, link and call each other. Run: pytest tests/docs/test_pages.py"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.documented import PAGES, blocks_of
from tests.support.forked import REPOSITORY

PACKAGE = REPOSITORY / "hft_megatron"
ALL_PAGES = [
    *PAGES,
    REPOSITORY / "CONTRIBUTING.md",
    *(REPOSITORY / "docker").glob("*.md"),
    *REPOSITORY.glob("tools/*/*.md"),
]
NAMED = re.compile(r"`((?:\w+/)*\w+\.(?:py|md)|tools/(?:\w+/)+\w+\.json)(?::([\w.]+))?`")
"""A file, and perhaps a symbol in it: ``hft/rules.py:RULES``."""
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([\w./-]*)(?:#([\w-]+))?\)")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


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
    return symbol in symbols_of(ast.parse(text_of(path)).body)


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_file_and_symbol_that_a_page_names_is_there() -> None:
    named = [
        (page.name, file, symbol)
        for page in ALL_PAGES
        for file, symbol in NAMED.findall(text_of(page))
        if file not in ("path.py", "pretrain_gpt.py") and "NAME" not in file
    ]
    assert len(named) > 120
    assert [f"{page}: {file}:{symbol}" for page, file, symbol in named if not is_there(file, symbol)] == []


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_of_a_page_leads_to_a_file_and_to_a_heading_in_it(page: Path) -> None:
    for _, file, anchor in LINK.findall(text_of(page)):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), file
        assert not anchor or anchor in anchors_of(target), f"{file}#{anchor}"


def test_a_page_has_one_name_in_its_title_in_the_index_and_in_the_readme() -> None:
    titles = {page.name: text_of(page).splitlines()[0].removeprefix("# ") for page in PAGES[1:]}
    del titles["index.md"]
    index = {file: name for name, file, _ in LINK.findall(text_of(REPOSITORY / "docs/index.md")) if file in titles}
    assert index == titles
    contents = text_of(REPOSITORY / "README.md").split("## Documentation")[1].split("\n## ")[0]
    readme = {Path(file).name: name for name, file, _ in LINK.findall(contents) if file.startswith("docs/")}
    assert {file: name.lower() for file, name in readme.items()} == {
        file: name.lower() for file, name in titles.items()
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_block_has_the_option_check_where_the_text_that_introduces_it_names_it(page: Path) -> None:
    """Where a block is run with stand-ins, they add the option; a reader has none."""
    lines = text_of(page).splitlines()
    for block in blocks_of(page):
        before = [line for line in lines[: block.line - 1] if not line.startswith(("```", "<!--"))]
        introduction = re.split(r"\n\n", "\n".join(before).rstrip())[-1]
        if introduction.endswith(":") and "`--check`" in introduction:
            assert "--check" in block.text, f"{block.page}:{block.line}"
