"""The pages of docs/ as a site. Run: pytest tests/docs/test_build.py"""

from pathlib import Path

import pytest

from tests.support.forked import run
from tests.support.ranks import REPOSITORY


@pytest.mark.long(reason="Sphinx imports the package, and renders all pages")
def test_sphinx_builds_every_page_without_a_warning(tmp_path: Path) -> None:
    """A warning is an error: a link that leads nowhere, a page that no other one names, a heading out of order."""
    pages = [page.relative_to(REPOSITORY / "docs") for page in (REPOSITORY / "docs").rglob("*.md")]
    assert Path("get_started.md") in pages
    words = ["-m", "sphinx", "-W", "--keep-going", "--quiet", "-b", "html", "-d", str(tmp_path / "doctrees")]
    done = run([*words, "docs", str(tmp_path / "site")], tmp_path)
    assert done.returncode == 0, done.stderr
    missing = [page for page in pages if not (tmp_path / "site" / page.with_suffix(".html")).is_file()]
    assert not missing
