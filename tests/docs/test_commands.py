"""Every command of README.md and docs/ runs; what needs a cluster or GPUs is checked, or meets stubs.

The comment before a block says how: ``<!-- run: check -->``, ``<!-- run: stub -->`` or ``<!-- run: no, WHY -->``;
without one it runs as it is. Run: pytest tests/docs
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.documented import PAGES, Block, Sandbox, blocks_of, make_tiny

SLOW = pytest.mark.slow(reason="each command is a process")
LANGUAGES = {"bash", "python", "text", "yaml", "json", "toml", "jinja", "{eval-rst}"}
"""Of blocks. Those of bash and python are run."""
MAY_NOT_RUN = ("another test runs it", "builds the environment", "needs the internet", "takes ten minutes")
"""Beginnings of the reasons for which a block is not run."""


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language in ("bash", "python")]


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Sandbox]:
    tiny = make_tiny(tmp_path_factory.mktemp("tiny"))
    return lambda: Sandbox(tmp_path_factory.mktemp("page"), tiny)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_block_names_its_language_and_is_left_out_for_few_reasons(page: Path) -> None:
    blocks = blocks_of(page)
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks)
    for block in blocks:
        assert block.language in LANGUAGES, f"{block.page}:{block.line}"
        assert block.manner != "no" or block.why.startswith(MAY_NOT_RUN), f"{block.page}:{block.line}: {block.why}"


@SLOW
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, sandbox: Callable[[], Sandbox]) -> None:
    folder = sandbox()
    for block in runnable(page):
        folder.run(block)
