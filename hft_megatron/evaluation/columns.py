"""Texts made of a row: one of its columns by name, or a jinja template over all of them."""

from functools import lru_cache
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hft_megatron.data.files.rows import Row
from hft_megatron.data.formats.conversations import kind_of
from hft_megatron.data.rendering import REFUSALS, in_line
from hft_megatron.errors import UserError


def _printed(value: Any) -> Any:
    if value is None:
        raise ValueError("a value that it prints is null")
    return value


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined,
    finalize=_printed,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
"""Like the environment of chat templates, but unknown names and printed nulls are errors, and a line end at the end is
kept."""


def is_template(written: str) -> bool:
    """True for a template, False for a column's name."""
    return "{{" in written or "{%" in written


@lru_cache(maxsize=256)
def compile_columns(written: str) -> jinja2.Template:
    """The compiled template. Raises ValueError with a clause for an invalid one."""
    try:
        return _ENVIRONMENT.from_string(written)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"is not valid jinja: line {error.lineno}: {in_line(str(error.message))}") from error


def value_of(written: str, field: str, row: Row) -> Any:
    """The column's value, or the template's text. ``choices.text`` is a column of a column.

    Raises UserError that names the row's place, the task's ``field`` and the existing columns.
    """
    if is_template(written):
        return rendered(written, field, row)
    value = _columns_of(row)
    for name in [written] if written in value else written.split("."):
        if not isinstance(value, dict) or name not in value:
            raise UserError(
                f"{row.place}: `{field}` is {written}, but there is no such column; {_columns_in_words(row)}."
            )
        value = value[name]
    if value is None:
        raise UserError(f"{row.place}: the column {written}, which is the task's `{field}`, is null; give it a value.")
    return value


def rendered(template: str, field: str, row: Row) -> str:
    """The template's text. Raises UserError like ``value_of``."""
    columns = _columns_of(row)
    try:
        return compile_columns(template).render({"row": columns} | columns)
    except REFUSALS as error:
        raise UserError(
            f"{row.place}: the template of `{field}` fails: {in_line(str(error))}; {_columns_in_words(row)}."
        ) from error


def text_of(written: str, field: str, row: Row) -> str:
    """The same as one text. Also raises UserError where a column holds another type."""
    return _text(value_of(written, field, row), field, row)


def texts_of(written: str, field: str, row: Row) -> list[str]:
    """The same where a column may hold a list of texts; at least one."""
    value = value_of(written, field, row)
    if not isinstance(value, list):
        return [_text(value, field, row)]
    if not value:
        raise UserError(f"{row.place}: `{field}` is an empty list; give it at least one text.")
    return [_text(entry, field, row) for entry in value]


def _text(value: Any, field: str, row: Row) -> str:
    if isinstance(value, (str, int, float)):
        return str(value)
    raise UserError(f"{row.place}: `{field}` is {kind_of(value)}, but it must be text; {_columns_in_words(row)}.")


def _columns_of(row: Row) -> dict[str, Any]:
    if not isinstance(row.value, dict):
        raise UserError(f"{row.place}: the row is {kind_of(row.value)}, but it must be an object with columns.")
    return row.value


def _columns_in_words(row: Row) -> str:
    return f"the columns are {', '.join(row.value)}" if row.value else "the row has no columns"
