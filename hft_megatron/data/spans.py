"""Finds what the assistant says in a rendered conversation, where the template doesn't mark it.

Where something was said to the assistant, by rendering the conversation up to the turn and up to its end. Before that
there is no conversation up to the turn: an answer that nobody asked for is found in the whole one, by a marked text in
its place, and begins behind the header that the template puts where generation starts.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hft_megatron.data.rendering import SPAN_END, SPAN_START, Renderer, TemplateError
from hft_megatron.data.special_tokens import SpecialTokens

Span = tuple[int, int]
"""The first character of what the model produces in a turn, and the one behind its last, without the end token."""
_PROBE = SPAN_START + SPAN_END
"""A text that no message can have, to see where a template puts an answer's."""


class SpanFinder:
    """Finds spans in texts of one template."""

    def __init__(self, renderer: Renderer, tokens: SpecialTokens) -> None:
        self._renderer = renderer
        self._tokens = tokens

    def find(self, messages: Sequence[Mapping[str, Any]], turn: int, rendered: str) -> Span:
        """The span of message ``turn`` in ``rendered``, the text of all ``messages``.

        Raises TemplateError where the template puts the turn there in another way than as a continuation.
        """
        if any(_asks(message) for message in messages[:turn]):
            return self._find_asked(messages, turn, rendered)
        return self._find_unasked(messages, turn, rendered)

    def _find_asked(self, messages: Sequence[Mapping[str, Any]], turn: int, rendered: str) -> Span:
        before = self._renderer.render(messages[:turn], add_generation_prompt=True)
        after = self._renderer.render(messages[: turn + 1], add_generation_prompt=False)
        exact = rendered.startswith(after) and after.startswith(before)
        content = (messages[turn]["content"] or "").strip()
        body = rendered[len(before) : len(after)]
        lead = len(body) - len(body.lstrip())
        if not exact or not body.startswith(content, lead) or not self._is_put_there(messages[: turn + 1], before):
            raise _not_found(turn)
        gap = re.compile(r"\s*").match(body, lead + len(content))
        assert gap is not None
        return len(before), len(before) + gap.end()

    def _is_put_there(self, messages: Sequence[Mapping[str, Any]], before: str) -> bool:
        """Whether nothing but white space is between ``before`` and the last message's text.

        Its own text can't tell: a short or empty one may also be the beginning of the turn's header.
        """
        head, found, _ = self._probed(messages, len(messages) - 1)
        return bool(found) and head.startswith(before) and not head[len(before) :].strip()

    def _find_unasked(self, messages: Sequence[Mapping[str, Any]], turn: int, rendered: str) -> Span:
        head, _, tail = self._probed(messages, turn)
        body = rendered[len(head) : max(len(head), len(rendered) - len(tail))]
        exact = head + body + tail == rendered and _PROBE not in tail
        if not exact or body.strip() != (messages[turn]["content"] or "").strip():
            raise _not_found(turn)
        end = len(head) + len(body)
        gap = re.compile(r"\s*").match(rendered, end)
        assert gap is not None
        closed = self._tokens.pattern.match(rendered, gap.end()) is not None
        return self._start(messages, turn, head), gap.end() if closed else end

    def _start(self, messages: Sequence[Mapping[str, Any]], turn: int, head: str) -> int:
        """Where generation would start in ``head``, all that is in front of the turn's text."""
        header = self._header(messages)
        if header:
            start = head.rfind(header) + len(header)
            found = header in head
        else:
            start = max((token.end() for token in self._tokens.pattern.finditer(head)), default=0)
            found = True
        if not found or head[start:].strip():
            raise _not_found(turn)
        return start

    def _header(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """What the template adds where generation starts; asked of these messages up to the last one that asks."""
        asking = [number for number, message in enumerate(messages) if _asks(message)]
        asked = messages[: asking[-1] + 1] if asking else messages
        without = self._renderer.render(asked, add_generation_prompt=False)
        with_header = self._renderer.render(asked, add_generation_prompt=True)
        return with_header.removeprefix(without) if with_header.startswith(without) else ""

    def _probed(self, messages: Sequence[Mapping[str, Any]], turn: int) -> tuple[str, str, str]:
        """All messages' text in front of and behind the text of ``turn``, with the probe, if it is there, between."""
        probed = [{**message, "content": _PROBE} if n == turn else message for n, message in enumerate(messages)]
        return self._renderer.render(probed, add_generation_prompt=False).partition(_PROBE)


def _asks(message: Mapping[str, Any]) -> bool:
    """Whether the assistant answers a message like this."""
    return message["role"] not in ("system", "developer", "assistant")


def _not_found(turn: int) -> TemplateError:
    return TemplateError(
        f"the chat template doesn't render message {turn + 1} as a continuation of the messages before it, so the "
        f"trained span can't be found; mark it with {{% generation %}} in the template"
    )
