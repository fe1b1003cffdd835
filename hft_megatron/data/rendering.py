"""Renders chat templates as transformers does: the same sandbox, names, variables and ``{% generation %}`` tag.

transformers' own compiler has private names that changed between the versions supported here, and what it adds to
messages changes as well. With a renderer of its own a template gives the same text under all of them, so that a run
resumes on the same data; tests hold its text and marks against ``apply_chat_template`` of the version installed.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Unicode keeps noncharacters for programs' own use; no text may contain them. They survive a template's trim filter.
SPAN_START, SPAN_END = "\ufdd0", "\ufdd1"
TEMPLATE_DATE = datetime(2024, 7, 26)
"""Templates that print the date get this one, Llama-3.1's default: today's would make other data of every day.

The one thing that differs from transformers, and on purpose."""
_ABSENT = {"tools": None, "documents": None}
"""Variables that transformers passes to every template, also where nobody gave them; templates ask for None."""


class TemplateError(ValueError):
    """A template that isn't one, or that refuses its messages; the message is a clause."""


class Renderer:
    """A jinja template with the variables it may use (``bos_token`` and so on)."""

    def __init__(self, template: str, variables: Mapping[str, str]) -> None:
        self._template = template
        self._variables = variables
        self.marks_spans = _has_generation_tag(template)
        """Whether what the assistant produces is marked by ``{% generation %}``."""

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The text, with SPAN_START and SPAN_END around what is marked. Raises TemplateError."""
        template = compile_template(self._template)
        try:
            return template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **_ABSENT, **self._variables
            )
        except _REFUSALS as error:
            raise TemplateError(f"the chat template refuses the messages: {_in_line(str(error))}") from error


_REFUSALS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What a template's own expressions can raise on messages that it doesn't expect."""


def _in_line(sentence: str) -> str:
    """A library's or a template's sentence as a part of another."""
    words = " ".join(sentence.split())
    return f"{words[:-3]}…" if words.endswith("...") else words.rstrip(" .!")


def cut_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks that the generation tag left, and (start, end) of each span."""
    parts = re.split(f"([{SPAN_START}{SPAN_END}])", marked)
    text, spans, start = "", [], 0
    for part in parts:
        if part == SPAN_START:
            start = len(text)
        elif part == SPAN_END:
            spans.append((start, len(text)))
        else:
            text += part
    return text, spans


class _GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}``, which transformers defines as what the assistant produces."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return SPAN_START + caller() + SPAN_END


def _has_generation_tag(template: str) -> bool:
    """Whether the template has the tag as code, and not in a comment or a text; False for one that isn't a template."""
    try:
        tokens = [(kind, text) for _, kind, text in jinja2.Environment().lex(template) if kind != "whitespace"]
    except jinja2.TemplateSyntaxError:
        return False
    return any(before[0] == "block_begin" and name == ("name", "generation") for before, name in pairwise(tokens))


@lru_cache(maxsize=8)
def compile_template(template: str) -> jinja2.Template:
    """Compile in a sandbox with the few names that transformers gives to chat templates. Raises TemplateError."""
    if not template.strip():
        raise TemplateError(
            "the chat template is empty text, which prints no message (--chat-template chooses another)"
        )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template is not valid jinja: line {error.lineno}: {_in_line(str(error.message))}"
        ) from error
