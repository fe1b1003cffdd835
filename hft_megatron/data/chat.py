"""Turns messages into pieces of text, with the text that the model has to produce marked as trained.

This is the assistant's text and the special token that ends it. Where the template doesn't mark it itself
(``{% generation %}``), it is found by rendering parts of the conversation (``rendering.py``); a span that cannot be
found exactly is an error and never a guess.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from hft_megatron.data.printed_keys import PrintedKeys, unusual_roles
from hft_megatron.data.record_errors import printable
from hft_megatron.data.rendering import SPAN_END, SPAN_START, Renderer, SpanFinder, TemplateError, Turn, cut_marks
from hft_megatron.data.tokenizer import ESCAPE, Piece, Place, SpecialTokens, TokenizerFacts


@dataclass(frozen=True, kw_only=True)
class LossRule:
    """The options --loss-on and --train-on-eos."""

    loss_on: Literal["assistant", "all", "last"] = "assistant"
    """The assistant's turns or the completion; everything, tags of the template included; the assistant's last turn."""
    train_on_eos: bool = True
    """True if the token that ends an assistant's turn or a completion is trained with it."""


_DEEPEST = 100
"""Levels of lists and objects in a message; code that walks through them has a limit as well, a few times as high."""
RESERVED = re.compile(f"[{SPAN_START}{SPAN_END}{ESCAPE}]")


class ChatError(ValueError):
    """A conversation that cannot be made an example; the message is a clause to follow ``file:line:``."""


class ChatTemplate:
    """A jinja chat template and the special tokens it may use."""

    def __init__(self, facts: TokenizerFacts, loss: LossRule) -> None:
        self._renderer = Renderer(facts.chat_template, facts.template_variables)
        self._tokens = SpecialTokens(facts.special_tokens)
        self._spans = SpanFinder(self._renderer, self._tokens)
        self._printed = PrintedKeys(self._renderer)
        self._loss = loss
        self._well_marked: set[tuple[tuple[str, bool], ...]] = set()
        """Roles and probed texts of conversations whose answers the template is known to mark."""

    def pieces(
        self, messages: Sequence[Mapping[str, Any]], *, given: int = 0, untrained: AbstractSet[int] = frozenset()
    ) -> list[Piece]:
        """The conversation as pieces; the first ``given`` messages are a prompt, and those ``untrained`` (indices) are
        left out of what the loss rule asks for.

        Raises ChatError when the template refuses it or loses a part of it, or a span isn't exact.
        """
        _refuse_unfit(messages)
        hidden = self._tokens.hide([dict(message) for message in messages])
        try:
            self._printed.check_keys(hidden)
            rendered, turns = self._render(hidden, given, untrained)
            self._printed.check_texts(hidden)
            self._check_names(messages, hidden, rendered)
        except TemplateError as error:
            raise ChatError(f"{self._tokens.show(str(error))}{unusual_roles(messages)}") from error
        return self._split(rendered, self._trained(turns, untrained, len(rendered)))

    def prompt_pieces(self, messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
        """The conversation up to where the assistant's next turn is generated, as pieces of which none is trained.

        They are those that ``pieces`` has in front of a trained turn. Raises ChatError when the template refuses the
        messages or loses a part of them, or marks answers that begin elsewhere.
        """
        _refuse_unfit(messages)
        hidden = self._tokens.hide([dict(message) for message in messages])
        try:
            self._printed.check_keys(hidden)
            rendered, _ = cut_marks(self._renderer.render(hidden, add_generation_prompt=True))
            self._printed.check_texts(hidden)
            self._check_names(messages, hidden, rendered, add_generation_prompt=True)
            self._check_start(hidden, rendered)
        except TemplateError as error:
            raise ChatError(f"{self._tokens.show(str(error))}{unusual_roles(messages)}") from error
        return self._split(rendered, [])

    def unread_keys(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """Yields the messages' harmless keys that the template doesn't print."""
        return self._printed.harmless(messages)

    def named_in(self, *texts: str) -> bool:
        """True if a text has the name of a special token."""
        return self._tokens.named_in(*texts)

    def _check_names(
        self,
        messages: Sequence[Mapping[str, Any]],
        hidden: Sequence[Mapping[str, Any]],
        rendered: str,
        *,
        add_generation_prompt: bool = False,
    ) -> None:
        """Raise TemplateError where the names of special tokens in texts, which are hidden while they are rendered,
        would have made another text: the template looks for them."""
        if hidden == list(messages):
            return
        as_written, _ = cut_marks(self._renderer.render(messages, add_generation_prompt=add_generation_prompt))
        if as_written != self._tokens.show(rendered):
            raise TemplateError(
                "the chat template looks for the name of a special token in a message's text, and would make another "
                "text of it; remove the name from the text, or the rule from the template"
            )

    def _check_start(self, messages: Sequence[Mapping[str, Any]], prompt: str) -> None:
        """Raise TemplateError where the template marks an answer that doesn't begin right after the prompt.

        With other templates an answer is the text after the prompt, or none is found.
        """
        if not self._renderer.marks_spans:
            return
        answered = [*messages, {"role": "assistant", "content": ESCAPE}]
        text, spans = cut_marks(self._renderer.render(answered, add_generation_prompt=False))
        if not spans or text[: spans[-1][0]] != prompt:
            raise TemplateError(
                "the chat template marks answers with {% generation %} that don't begin where generation starts; print "
                "the text between them where add_generation_prompt is true"
            )

    def _render(
        self, messages: Sequence[Mapping[str, Any]], given: int, untrained: AbstractSet[int]
    ) -> tuple[str, list[Turn]]:
        """The text, and those assistant's turns whose position decides what is trained."""
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        rendered, spans = cut_marks(self._renderer.render(messages, add_generation_prompt=False))
        if self._renderer.marks_spans:
            if len(spans) != len(answers):
                raise ChatError(f"the chat template marks {len(spans)} trained spans, not one per assistant turn")
            self._check_marks(messages, answers)
        first = {"all": 0, "last": len(answers) - 1}.get(self._loss.loss_on, sum(turn < given for turn in answers))
        turns = []
        for number, turn in list(enumerate(answers))[first:]:
            if turn in untrained and self._loss.loss_on != "all":
                continue
            if self._renderer.marks_spans:
                span = _checked_mark(rendered, spans[number], messages[turn], turn)
                found = self._spans.with_end_token(messages[: turn + 1], span, rendered)
            else:
                found = self._spans.find(messages, turn, rendered)
                if turn + 1 < len(messages):
                    # Text printed only with a later message is no part of this turn, and would not be learned.
                    self._printed.check_keys(messages[: turn + 1], first=turn)
            turns.append(self._checked_end(found))
        return rendered, turns

    def _check_marks(self, messages: Sequence[Mapping[str, Any]], answers: Sequence[int]) -> None:
        """Raise ChatError where the marks are around other turns; the texts alone could match by chance."""
        # An answer without text may be only a tool call, in whose place a text would be another answer.
        probed = [bool(message["content"]) or message.keys() <= {"role", "content"} for message in messages]
        shape = tuple((message["role"], probe) for message, probe in zip(messages, probed, strict=True))
        if shape in self._well_marked:
            return
        probes = [
            {**message, "content": f"{ESCAPE}{turn}{ESCAPE}"} if probed[turn] else message
            for turn, message in enumerate(messages)
        ]
        text, spans = cut_marks(self._renderer.render(probes, add_generation_prompt=False))
        if len(spans) == len(answers):
            for turn, span in zip(answers, spans, strict=True):
                _checked_mark(text, span, probes[turn], turn)
            self._well_marked.add(shape)

    def _checked_end(self, turn: Turn) -> Turn:
        """``turn``, if its end token is there or is not to be trained."""
        if turn.end == turn.text_end and self._loss.train_on_eos:
            raise ChatError(
                "the chat template puts no special token right after the assistant's text, so the end of a turn cannot "
                "be learned; end the turn with eos_token in the template, or choose --no-train-on-eos"
            )
        return turn

    def _trained(self, turns: Sequence[Turn], untrained: AbstractSet[int], length: int) -> list[tuple[int, int]]:
        """(start, end) of the trained spans, in order and apart from each other."""
        if self._loss.loss_on != "all":
            return [(turn.start, turn.end if self._loss.train_on_eos else turn.text_end) for turn in turns]
        for message in sorted(untrained - {turn.message for turn in turns}):
            raise ChatError(
                f"message {message + 1} is not to be trained, but --loss-on all trains everything except answers; "
                f"choose another --loss-on, or remove the message's key"
            )
        edges = [0]
        for turn in turns:
            if turn.message in untrained:
                edges += [turn.start, turn.end]
            elif not self._loss.train_on_eos:
                edges += [turn.text_end, turn.end]
        edges.append(length)
        return list(zip(edges[::2], edges[1::2], strict=True))

    def _split(self, rendered: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
        pieces: list[Piece] = []
        position = 0
        for found in self._tokens.pattern.finditer(rendered):
            pieces.extend(self._plain(rendered, position, found.start(), spans, bool(pieces)))
            # Not the match's end: white space after the name may be the beginning of a span, or after one.
            name_end = self._tokens.name_end(found)
            trained = any(start < name_end <= end for start, end in spans)
            pieces.append(Piece(text=self._tokens.found(found).content, place=Place.SPECIAL, trained=trained))
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
            pieces.append(Piece(text=self._tokens.show(rendered[left:right]), place=place, trained=trained))
        return pieces


def end_token_ids(facts: TokenizerFacts) -> list[int]:
    """Tokens that stop generation: the end token, and the one that the template ends an answer with, if different.

    A template that refuses a plain question and answer has trained none; then only the end token is known.
    """
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    try:
        pieces = ChatTemplate(facts, LossRule()).pieces([question, answer])
    except ChatError:
        return [facts.eos_id]
    trained = {piece.text for piece in pieces if piece.trained and piece.place is Place.SPECIAL}
    ends = [token.id for token in facts.special_tokens if token.content in trained]
    return list(dict.fromkeys([facts.eos_id, *ends]))


def _refuse_unfit(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise ChatError for a message that is nested too deeply to be read, or has a character that marks spans."""
    for index, message in enumerate(messages):
        for key, value in message.items():
            if _is_deeper(value, _DEEPEST):
                key = printable(key)
                raise ChatError(
                    f"`{key}` of message {index + 1} has more than {_DEEPEST} levels of lists and objects; use fewer, "
                    f"or ignore it with --ignore-keys {key}"
                )
        _refuse_reserved(message)


def _is_deeper(value: Any, levels: int) -> bool:
    """True if ``value`` has more than ``levels`` levels of lists and objects."""
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
    return inside is not None and (levels == 0 or any(_is_deeper(inner, levels - 1) for inner in inside))


def _refuse_reserved(value: Any) -> None:
    """Raise ChatError for a text, at any depth, that holds one of the characters that mark spans."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_reserved(key)
            _refuse_reserved(inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_reserved(inner)
    elif isinstance(value, str) and RESERVED.search(value):
        raise ChatError("the text contains a Unicode noncharacter between U+FDD0 and U+FDD2; remove it")


def _checked_mark(rendered: str, span: tuple[int, int], message: Mapping[str, Any], turn: int) -> tuple[int, int]:
    """``span``, if it holds the turn's text: a template may mark more, such as a chain of thought, but not less."""
    if (message["content"] or "").strip() not in rendered[slice(*span)]:
        raise ChatError(
            f"the text that the chat template marks with {{% generation %}} for message {turn + 1} doesn't hold the "
            f"message's text; correct the template"
        )
    return span
