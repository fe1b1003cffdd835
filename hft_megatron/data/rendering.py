"""Renders chat templates as transformers does, and finds the assistant's turns in their text.

The same sandbox, names, variables and ``{% generation %}`` tag: transformers' own compiler has private names that
changed between the versions supported here, counts spans wrong that begin a text or are in a ``{% set %}`` block, and
changes what it adds to messages. With a renderer of its own a template gives the same text under all versions, so that
a run resumes on the same data; tests compare its text and marks with ``apply_chat_template`` of the installed one.

A turn that the template doesn't mark is found, where it follows a message to the assistant, by rendering the
conversation up to the turn and up to its end: the text between is the turn, with its thoughts and tool calls. Before
the first such message there is no conversation up to the turn: an unprompted answer is found in the whole one, by a
marked text in its place, and begins after the header that the template puts where generation starts.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hft_megatron.data.tokenizer import SpecialTokens

# Unicode keeps noncharacters for programs' own use; no text may contain them. They survive a template's trim filter.
SPAN_START, SPAN_END = "\ufdd0", "\ufdd1"
TEMPLATE_DATE = datetime(2024, 7, 26)
"""Date for templates that print one, Llama-3.1's default: today's would make other data every day.

The only intended difference from transformers."""
_ABSENT = {"tools": None, "documents": None}
"""Variables that transformers passes to every template, even when unset; templates test for None."""


class TemplateError(ValueError):
    """An invalid template, or one that refuses its messages; the message is a clause."""


class Renderer:
    """A jinja template with the variables it may use (``bos_token`` and so on)."""

    def __init__(self, template: str, variables: Mapping[str, str]) -> None:
        self._template = template
        self._variables = variables
        self.marks_spans = _has_generation_tag(template)
        """True if ``{% generation %}`` marks the assistant's text."""

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The text, with SPAN_START and SPAN_END around marked spans. Raises TemplateError."""
        template = compile_template(self._template)
        try:
            return template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **_ABSENT, **self._variables
            )
        except REFUSALS as error:
            raise TemplateError(f"the chat template refuses the messages: {in_line(str(error))}") from error


REFUSALS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""Errors that a template's own expressions can raise on messages that it doesn't expect."""


def in_line(sentence: str) -> str:
    """A library's or a template's sentence as a part of another."""
    words = " ".join(sentence.split())
    return f"{words[:-3]}…" if words.endswith("...") else words.rstrip(" .!")


def cut_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks of the generation tag, and (start, end) of each span."""
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
    """``{% generation %}...{% endgeneration %}``, transformers' tag around the assistant's text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return SPAN_START + caller() + SPAN_END


def _has_generation_tag(template: str) -> bool:
    """True if the template has the tag as code, and not in a comment or a text; False for an invalid template."""
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
            f"the chat template is not valid jinja: line {error.lineno}: {in_line(str(error.message))}"
        ) from error


_PROBE = SPAN_START + SPAN_END
"""A text that no message can have, which shows where a template puts an answer's text."""
_BEFORE = "it puts other text before the message's"
_BEHIND = "it puts other text after the message's"
_AROUND = "it puts other text before or after the message's, and no special token at the end"
_OTHER_TEXT = "it doesn't put the message's text there as it is"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Place of one assistant's turn in the rendered text."""

    message: int
    start: int
    text_end: int
    """Position after the text, before the end token."""
    end: int
    """Position after the end token; ``text_end`` where the turn has none."""


class SpanFinder:
    """Finds turns in texts of one template."""

    def __init__(self, renderer: Renderer, tokens: SpecialTokens) -> None:
        self._renderer = renderer
        self._tokens = tokens

    def find(self, messages: Sequence[Mapping[str, Any]], turn: int, rendered: str) -> Turn:
        """Message ``turn`` in ``rendered``, the text of all ``messages``.

        Raises TemplateError where the template renders the turn there in another way than as a continuation.
        """
        if any(_asks(message) for message in messages[:turn]):
            return self._find_asked(messages[: turn + 1], rendered)
        return self._find_unasked(messages, turn, rendered)

    def with_end_token(self, messages: Sequence[Mapping[str, Any]], span: tuple[int, int], rendered: str) -> Turn:
        """The last message's turn, whose text is marked, with the special token that ends the mark, or that directly
        follows it. One after it ends the turn only if no text of the same turn follows, such as a tool call."""
        turn, (start, end) = len(messages) - 1, span
        inside = list(self._tokens.pattern.finditer(rendered, start, end))
        if inside and inside[-1].end() == end:
            return Turn(message=turn, start=start, text_end=inside[-1].start(), end=end)
        behind = self._tokens.pattern.match(rendered, end)
        if behind is not None:
            whole = self._whole(messages)
            closing = self._closing(whole, end)
            # The next turn may begin with a special token, which is not there before the next turn is.
            if closing and rendered[:end] == whole[:end] and closing[0].start() == end:
                return Turn(message=turn, start=start, text_end=end, end=self._tokens.name_end(behind))
        return Turn(message=turn, start=start, text_end=end, end=end)

    def _find_asked(self, messages: Sequence[Mapping[str, Any]], rendered: str) -> Turn:
        turn = len(messages) - 1
        before = self._renderer.render(messages[:turn], add_generation_prompt=True)
        after = self._renderer.render(messages, add_generation_prompt=False)
        if not after.startswith(before):
            raise _not_found(turn)
        start = len(before)
        head, tail = self._around_a_text(messages)
        if not (_reaches(head, before) or self._has_header(messages[:turn], before)):
            raise _not_found(turn, _BEFORE)
        found = self._end_token(after, start, tail)
        if found is None:
            return self._without_end_token(messages, before, after, rendered)
        text_end, end = found
        if rendered[:end] != after[:end]:
            raise _not_found(turn)
        content = (messages[turn]["content"] or "").strip()
        # The header may hold the beginning of the text, like one that opens a thought.
        if content and after.rfind(content, max(0, start - len(content) + 1), text_end) < 0:
            raise _not_found(turn, _OTHER_TEXT)
        return Turn(message=turn, start=start, text_end=text_end, end=end)

    def _without_end_token(self, messages: Sequence[Mapping[str, Any]], before: str, after: str, rendered: str) -> Turn:
        """The last message's turn where no special token ends it: its text, if the template adds nothing to that."""
        turn, start = len(messages) - 1, len(before)
        if self._tokens.pattern.search(after, start) or not rendered.startswith(after):
            raise _not_found(turn, _BEHIND)
        head, _, tail = self._probed(messages, turn)
        content, body = (messages[turn]["content"] or "").strip(), after[start:]
        lead = len(body) - len(body.lstrip())
        # Its own text cannot tell: a short or empty one may also be the beginning of the template's addition.
        if not _reaches(head, before) or not body.startswith(content, lead) or tail != self._around_a_text(messages)[1]:
            raise _not_found(turn, _AROUND)
        gap = re.compile(r"\s*").match(body, lead + len(content))
        assert gap is not None
        return Turn(message=turn, start=start, text_end=start + gap.end(), end=start + gap.end())

    def _around_a_text(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
        """The template's text before and after the text of the last message, if that has only a text."""
        plain = [*messages[:-1], {"role": messages[-1]["role"], "content": ""}]
        try:
            head, found, tail = self._probed(plain, len(plain) - 1)
        except TemplateError:  # it needs another key
            return "", ""
        return (head, tail) if found else ("", "")

    def _has_header(self, messages: Sequence[Mapping[str, Any]], before: str) -> bool:
        """True if ``before`` ends with a header, after which the model produces everything."""
        without = self._renderer.render(messages, add_generation_prompt=False)
        return before.startswith(without) and bool(before[len(without) :].strip())

    def _end_token(self, text: str, start: int, tail: str) -> tuple[int, int] | None:
        """(start, end) of the special token that ends the turn from ``start`` to the end of ``text``; None without one.

        Only special tokens and white space may follow it. ``tail`` is the template's text after any message: the first
        one in it ends a turn, and others may end the conversation. Where the turn ends otherwise it is the last one.
        """
        usual = self._closing(tail, 0)
        if usual and text.endswith(tail) and len(text) - len(tail) >= start:
            shift = len(text) - len(tail)
            return shift + usual[0].start(), shift + self._tokens.name_end(usual[0])
        closing = self._closing(text, start)
        return (closing[-1].start(), self._tokens.name_end(closing[-1])) if closing else None

    def _closing(self, text: str, start: int) -> list[re.Match[str]]:
        """The special tokens at the end of ``text``, with only white space between and after them."""
        closing: list[re.Match[str]] = []
        end = len(text)
        for token in reversed(list(self._tokens.pattern.finditer(text, start))):
            if text[token.end() : end].strip():
                break
            closing.insert(0, token)
            end = token.start()
        return closing

    def _whole(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of ``messages`` as a whole conversation."""
        try:
            return cut_marks(self._renderer.render(messages, add_generation_prompt=False))[0]
        except TemplateError:
            if len(messages) > 1:
                raise
            raise TemplateError(
                "the chat template refuses the assistant's first message alone, so where it ends cannot be found; "
                "remove the message, or mark it with {% generation %} in the template"
            ) from None

    def _find_unasked(self, messages: Sequence[Mapping[str, Any]], turn: int, rendered: str) -> Turn:
        head, put, tail = self._probed(messages, turn)
        if not put:
            raise _not_found(turn, _OTHER_TEXT)
        body = rendered[len(head) : max(len(head), len(rendered) - len(tail))]
        exact = head + body + tail == rendered and _PROBE not in tail
        if not exact or body.strip() != (messages[turn]["content"] or "").strip():
            raise _not_found(turn)
        start, text_end = self._start(messages, turn, head), len(head) + len(body)
        whole = self._whole(messages[: turn + 1])
        plain_tail = self._around_a_text(messages[: turn + 1])[1]
        found = self._end_token(whole, start, plain_tail)
        if found is not None and rendered[: found[1]] == whole[: found[1]]:
            return Turn(message=turn, start=start, text_end=found[0], end=found[1])
        own_tail = self._probed(messages[: turn + 1], turn)[2]
        if own_tail != plain_tail or (found is None and self._tokens.pattern.search(own_tail)):
            raise _not_found(turn, _BEHIND)
        gap = re.compile(r"\s*").match(rendered, text_end)
        assert gap is not None
        end = gap.end() if self._tokens.pattern.match(rendered, gap.end()) else text_end
        return Turn(message=turn, start=start, text_end=end, end=end)

    def _start(self, messages: Sequence[Mapping[str, Any]], turn: int, head: str) -> int:
        """Position where generation would start in ``head``, the text before the turn's text."""
        header = self._header(messages)
        if header:
            start = head.rfind(header) + len(header)
            found = header in head
        else:
            start = max((token.end() for token in self._tokens.pattern.finditer(head)), default=0)
            found = True
        if not found or head[start:].strip():
            raise _not_found(turn, _BEFORE)
        return start

    def _header(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The template's addition where generation starts; for these messages up to the last one that asks."""
        asking = [number for number, message in enumerate(messages) if _asks(message)]
        asked = messages[: asking[-1] + 1] if asking else messages
        without = self._renderer.render(asked, add_generation_prompt=False)
        with_header = self._renderer.render(asked, add_generation_prompt=True)
        return with_header.removeprefix(without) if with_header.startswith(without) else ""

    def _probed(self, messages: Sequence[Mapping[str, Any]], turn: int) -> tuple[str, str, str]:
        """All messages' text before and after the text of ``turn``, with the probe, if it is there, between."""
        probed = [{**message, "content": _PROBE} if n == turn else message for n, message in enumerate(messages)]
        return self._renderer.render(probed, add_generation_prompt=False).partition(_PROBE)


def _asks(message: Mapping[str, Any]) -> bool:
    """True if the assistant answers a message like this."""
    return message["role"] not in ("system", "developer", "assistant")


def _reaches(head: str, before: str) -> bool:
    """True if only white space is between ``before`` and the end of ``head``."""
    return head.startswith(before) and not head[len(before) :].strip()


def _not_found(turn: int, reason: str = "") -> TemplateError:
    return TemplateError(
        f"the chat template doesn't render message {turn + 1} as a continuation of the messages before it"
        f"{': ' if reason else ''}{reason}, so the trained span cannot be found; mark it with {{% generation %}} in "
        f"the template"
    )
