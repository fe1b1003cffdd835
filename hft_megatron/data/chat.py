"""Turns messages into pieces of text, the assistant's turns marked as trained.

A trained span is what the model has to produce for a turn: the assistant's text and the special token that ends it.
Where the template doesn't mark the span itself (``{% generation %}``), it is found by rendering the conversation up to
the turn and up to its end; a span that can't be found exactly is an error and never a guess.
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

from hft_megatron.data.tokenizer import Piece, Place, SpecialToken, TokenizerFacts

# Unicode keeps these three for programs' own use; no text may contain them. They survive a template's trim filter.
SPAN_START, SPAN_END, ESCAPE = "\ufdd0", "\ufdd1", "\ufdd2"
RESERVED = re.compile(f"[{SPAN_START}{SPAN_END}{ESCAPE}]")
GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
TEMPLATE_DATE = datetime(2024, 7, 26)
"""Templates that print the date get this one, Llama-3.1's default: today's would make other data of every day."""


class ChatError(ValueError):
    """A conversation that can't be made an example; the message is a clause to follow ``file:line:``."""


class ChatTemplate:
    """A jinja chat template and the special tokens it may use."""

    def __init__(self, facts: TokenizerFacts) -> None:
        self.text = facts.chat_template
        self._variables = facts.template_variables
        self._marks_spans = GENERATION_TAG.search(self.text) is not None
        self._specials = {token.content: token for token in facts.special_tokens}
        self._in_text = _pattern(facts.special_tokens, lambda token: re.escape(token.content))
        self._in_template = _pattern(facts.special_tokens, _with_stripped_space)

    def pieces(self, messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
        """The conversation as pieces. Raises ChatError when the template refuses it or a span isn't exact."""
        escaped = [{key: self._escape(value) for key, value in message.items()} for message in messages]
        if self._marks_spans:
            rendered, spans = _cut_marks(self._render(escaped, add_generation_prompt=False))
        else:
            rendered = self._render(escaped, add_generation_prompt=False)
            spans = [
                self._find_span(escaped, turn, rendered)
                for turn, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
        if len(spans) != sum(message["role"] == "assistant" for message in messages):
            raise ChatError(f"the chat template marks {len(spans)} trained spans, not one per assistant turn")
        return self._split(rendered, [self._with_end_token(rendered, span) for span in spans])

    def _escape(self, value: Any) -> Any:
        """Hide special tokens in a user's text, so that only the template's own are recognised later."""
        if not isinstance(value, str):
            return value
        if RESERVED.search(value):
            raise ChatError("the text contains a Unicode noncharacter between U+FDD0 and U+FDD2; remove it")
        names = list(self._specials)
        return self._in_text.sub(lambda found: f"{ESCAPE}{names.index(found[0])}{ESCAPE}", value)

    def _unescape(self, text: str) -> str:
        names = list(self._specials)
        return re.sub(f"{ESCAPE}(\\d+){ESCAPE}", lambda found: names[int(found[1])], text)

    def _render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        try:
            return _compile(self.text).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._variables
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise ChatError(f"the chat template refuses the messages: {error}") from error

    def _find_span(self, messages: Sequence[Mapping[str, Any]], turn: int, rendered: str) -> tuple[int, int]:
        """Characters of ``rendered`` that the model produces in this turn, up to its end token."""
        before = self._render(messages[:turn], add_generation_prompt=True)
        after = self._render(messages[: turn + 1], add_generation_prompt=False)
        exact = rendered.startswith(after) and after.startswith(before)
        content = str(messages[turn]["content"]).strip()
        body = rendered[len(before) : len(after)]
        lead = len(body) - len(body.lstrip())
        if not exact or not body.startswith(content, lead):
            raise ChatError(
                f"the chat template doesn't render message {turn + 1} as a continuation of the messages before it, so "
                f"the trained span can't be found; mark it with {{% generation %}} in the template"
            )
        gap = re.compile(r"\s*").match(body, lead + len(content))
        assert gap is not None
        return len(before), len(before) + gap.end()

    def _with_end_token(self, rendered: str, span: tuple[int, int]) -> tuple[int, int]:
        """Extend the span over the special token right behind it, unless it ends with one already."""
        start, end = span
        inside = [found.end() for found in self._in_template.finditer(rendered, start, end)]
        if inside and inside[-1] == end:
            return span
        behind = self._in_template.match(rendered, end)
        if behind is None:
            raise ChatError(
                "the chat template puts no special token right behind the assistant's text, so the end of a turn can't "
                "be learned; end the turn with eos_token in the template"
            )
        return start, behind.end()

    def _split(self, rendered: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
        pieces: list[Piece] = []
        position = 0
        for found in self._in_template.finditer(rendered):
            pieces.extend(self._plain(rendered, position, found.start(), spans, bool(pieces)))
            token = self._specials.get(found[0]) or self._specials[found[0].strip()]
            trained = any(start < found.end() <= end for start, end in spans)
            pieces.append(Piece(text=token.content, place=Place.SPECIAL, trained=trained))
            position = found.end()
        pieces.extend(self._plain(rendered, position, len(rendered), spans, bool(pieces)))
        return pieces

    def _plain(
        self, rendered: str, begin: int, end: int, spans: Sequence[tuple[int, int]], after_special: bool
    ) -> list[Piece]:
        """The text between two special tokens, cut where a trained span starts or ends."""
        cuts = sorted({begin, end, *(edge for span in spans for edge in span if begin < edge < end)})
        pieces = []
        for left, right in pairwise(cuts):
            first = Place.AFTER_SPECIAL if after_special else Place.START
            place = first if left == begin else Place.INSIDE
            trained = any(start <= left and right <= stop for start, stop in spans)
            pieces.append(Piece(text=self._unescape(rendered[left:right]), place=place, trained=trained))
        return pieces


def _pattern(tokens: Sequence[SpecialToken], form: Callable[[SpecialToken], str]) -> re.Pattern[str]:
    """Matches any of the tokens, a longer one before its own beginning."""
    longest_first = sorted(tokens, key=lambda token: -len(token.content))
    return re.compile("|".join(form(token) for token in longest_first))


def _with_stripped_space(token: SpecialToken) -> str:
    left = r"\s*" if token.strips_left else ""
    right = r"\s*" if token.strips_right else ""
    return left + re.escape(token.content) + right


def _cut_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Remove the marks that the generation tag left, and say where they stood."""
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


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    """Compile in a sandbox with the few names that transformers gives to chat templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ChatError(f"the chat template is not valid jinja: {error}") from error
