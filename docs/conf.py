"""Sphinx's settings: ``make docs`` builds the pages of this folder into build/docs. It needs no network."""

import re
from pathlib import Path

from sphinx.application import Sphinx

_PACKAGE = Path(__file__).resolve().parents[1] / "hft_megatron"
_VERSION = re.search(r'^__version__ = "(.+)"$', (_PACKAGE / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
assert _VERSION is not None

project = "hft_megatron"
release = version = _VERSION.group(1)
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False


def _link_the_repository_s_pages(app: Sphinx, name: str, source: list[str]) -> None:
    """Has links to Markdown files outside this folder lead to the file: they are no pages of the site."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)(?:#[^)]*)?\)", r"](path:\1)", source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _link_the_repository_s_pages)
