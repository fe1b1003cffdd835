"""The interface of every tokenizer, whatever its file format.

A text is given as pieces, because the places where a text is cut decide its tokens: special tokens come from the
template and never from a user's text, and a trained span is cut from its prompt exactly where generation would start.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hft_megatron.errors import UserError

ESCAPE = "\ufdd2"
"""Unicode keeps this noncharacter for programs' own use; no text may contain it, and no trim filter removes it."""


@dataclass(frozen=True, kw_only=True)
class SpecialToken:
    """A control token that only a template may produce."""

    content: str
    id: int
    strips_left: bool = False
    """White space before it in a rendered template belongs to it (Hugging Face's ``lstrip``)."""
    strips_right: bool = False


AnyTokenizer = TypeVar("AnyTokenizer", bound="Tokenizer")
SPACE_MARK = "▁"
"""Represents a space in the pieces of SentencePiece and in tokenizers made from them."""
Encoded = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""Token ids of an example and which of them are trained, both of shape (tokens,)."""


class Place(Enum):
    """Place of a piece of text, which decides whether the tokenizer may put its word-start mark before it."""

    START = "start"
    """The first text of a sequence."""
    AFTER_SPECIAL = "after special"
    """Directly after a special token; tokenizers differ here, so each has its own rule."""
    INSIDE = "inside"
    """Continues the text before it: the word-start mark would be a space nobody wrote."""
    SPECIAL = "special"
    """The text is the name of one special token."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of text that is tokenized on its own and trained as a whole or not at all."""

    text: str
    place: Place
    trained: bool


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """Constant facts about a loaded tokenizer."""

    source: str
    """File or folder it came from, for error messages."""
    identity: str
    """sha256 of everything that decides the ids of a text."""
    vocab_size: int
    """Largest id plus one, added tokens included."""
    fed_vocab_size: int
    """The same without a token that is only for padding, which is never fed to a model."""
    bos_id: int | None
    """The begin token where the tokenizer puts one before a text; None where it has none or never puts it."""
    eos_id: int
    pad_id: int
    """Token that fills up a batch; never read by the model."""
    names_pad: bool
    """True if an export names it: not where the source's files name special tokens, and none for padding."""
    special_tokens: tuple[SpecialToken, ...]
    chat_template: str
    """The tokenizer's own jinja template, or its replacement by --chat-template or the project."""
    names_in_text: tuple[str, ...] = ()
    """Names of tokens that are not special and that are searched for in a text as a whole."""
    template_variables: Mapping[str, str] = field(default_factory=dict)
    """``bos_token``, ``eos_token`` and so on, by their names in templates."""
    notes: tuple[str, ...] = ()
    """Lines for the log about unexpected content of the files."""
    exports_own_files: bool = False
    """True if an export writes tokenizer files instead of copying the folder's, which transformers reads otherwise."""

    def named_id(self, key: str) -> int | None:
        """The special token of ``bos_token`` and so on; None where the tokenizer has none."""
        name = self.template_variables.get(key)
        return next((token.id for token in self.special_tokens if token.content == name), None)


class Tokenizer(ABC):
    """Text to ids and back. Special tokens in a text are ordinary characters of it."""

    _normalize: Callable[[str], str] | None = None
    """Normalization by a tokenizer that removes white space at the end of a text, before it cuts it."""

    def __init__(self, facts: TokenizerFacts) -> None:
        self._set_facts(facts)

    def _set_facts(self, facts: TokenizerFacts) -> None:
        self.facts = facts
        self.vocab_size = facts.vocab_size
        self.bos_id = facts.bos_id
        self.eos_id = facts.eos_id
        self.pad_id = facts.pad_id
        self._special_ids = {token.content: token.id for token in facts.special_tokens}

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, continues: bool) -> list[list[int]]:
        """Ids of each text, without beginning or end token.

        ``continues`` leaves out the word-start mark that SentencePiece-like tokenizers put before a text.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special tokens are left out."""

    @abstractmethod
    def export(self, directory: Path, *, keep_source: bool = False, adds_template: bool = True) -> list[str]:
        """Write files from which transformers' ``AutoTokenizer`` loads an equal tokenizer.

        Chat templates stay in the folder's files, or its list, with the one in use as the default; where it has none,
        that one is added if ``adds_template``. ``keep_source`` copies the files of a Hugging Face folder as they are
        (--keep-source-tokenizer). Returns lines for the log about files that are not the source's.
        """

    def with_facts(self: AnyTokenizer, **changes: Any) -> AnyTokenizer:
        """The same tokenizer with some of its facts changed."""
        other = copy(self)
        other._set_facts(replace(self.facts, **changes))
        return other

    @property
    @abstractmethod
    def continues_after_special(self) -> bool:
        """True if text after a special token is encoded without the word-start mark."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without beginning or end token."""
        return self.encode_batch([text], continues=False)[0]

    def encode_pieces(self, examples: Sequence[Sequence[Piece]]) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """Ids and trained mask of each example, both of shape (tokens,).

        Pieces are encoded in two batches and each distinct one only once: templates repeat the same few. White space
        that the tokenizer removes at the end of a piece begins the next one: a prompt's ids are those that inference
        sends, and the answer is still a word of its own.
        """
        settled = [self._settle(pieces) for pieces in examples]
        wanted: dict[bool, dict[str, int]] = {False: {}, True: {}}
        for pieces in settled:
            for text, continues, is_special in pieces:
                if not is_special:
                    wanted[continues].setdefault(text, len(wanted[continues]))
        encoded = {
            key: [np.array(ids, dtype=np.int32) for ids in self.encode_batch(list(texts), continues=key)]
            for key, texts in wanted.items()
        }
        special = {name: np.array([token], dtype=np.int32) for name, token in self._special_ids.items()}

        results = []
        for example, pieces in zip(examples, settled, strict=True):
            parts = [
                special[text] if is_special else encoded[continues][wanted[continues][text]]
                for text, continues, is_special in pieces
            ]
            ids = np.concatenate([np.empty(0, dtype=np.int32), *parts])
            mask = np.repeat(
                np.array([piece.trained for piece in example], dtype=np.bool_),
                np.array([len(part) for part in parts], dtype=np.int64),
            )
            results.append((ids, mask))
        return results

    def _settle(self, pieces: Sequence[Piece]) -> list[tuple[str, bool, bool]]:
        """For each piece the text to encode, whether it continues another, and whether it is a special token."""
        settled = []
        carried, nothing_yet = "", False
        for piece in pieces:
            if piece.place is Place.SPECIAL:
                settled.append((piece.text, False, True))
                carried, nothing_yet = "", False
                continue
            text, continues = carried + piece.text, self._continues(piece.place) and not nothing_yet
            settled.append((text, continues, False))
            carried = self._lost_at_end(text)
            nothing_yet = carried != "" and not continues and text.isspace()
        return settled

    def _lost_at_end(self, text: str) -> str:
        """The white space that is removed at the end of ``text``, but would not be before more text."""
        if self._normalize is None or "!" <= text[-1:] <= "~":  # no normalization makes white space of these
            return ""
        # A letter on either side, as white space is removed at the start, too.
        at_end, kept = self._normalize(f"a{text}"), self._normalize(f"a{text}a")[:-1]
        return kept.removeprefix(at_end).replace(SPACE_MARK, " ") if kept.startswith(at_end) else ""

    def _continues(self, place: Place) -> bool:
        return place is Place.INSIDE or (place is Place.AFTER_SPECIAL and self.continues_after_special)

    def special(self, token_id: int, *, trained: bool) -> Piece:
        """The special token with this id as a piece."""
        content = next(token.content for token in self.facts.special_tokens if token.id == token_id)
        return Piece(text=content, place=Place.SPECIAL, trained=trained)


def choose_pad_id(pad_id: int | None, unk_id: int | None, eos_id: int) -> int:
    """The padding token: the tokenizer's own, else its unknown token, else its end token.

    Padding is masked by position and not by id, so the end token is trained even when padding shares its id.
    """
    if pad_id is not None:
        return pad_id
    return unk_id if unk_id is not None else eos_id


def fed_vocab_size(ids: Iterable[int], named: Mapping[str, int]) -> int:
    """Largest of ``ids`` plus one, without that of a pad token which is none of the other ``named`` ones as well."""
    only_pad = {named.get("pad_token")} - {number for key, number in named.items() if key != "pad_token"}
    return max(number for number in ids if number not in only_pad) + 1


def fit_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """The tokenizer for a model whose embedding has ``vocab_size`` rows.

    A padding token without a row is replaced by another, since it is never fed. Raises UserError where another token
    has none.
    """
    facts = tokenizer.facts
    if facts.fed_vocab_size > vocab_size:
        raise UserError(
            f"--tokenizer-model {facts.source} has ids up to {facts.fed_vocab_size - 1}, but the model's "
            f"vocabulary has {vocab_size} rows; use the tokenizer that belongs to the model."
        )
    if facts.pad_id < vocab_size:
        return tokenizer
    names = {token.id: token.content for token in facts.special_tokens}
    pad_id = choose_pad_id(None, facts.named_id("unk_token"), facts.eos_id)
    note = (
        f"{facts.source}: the pad token {names[facts.pad_id]} has the id {facts.pad_id}, but the model has only "
        f"{vocab_size} rows; {names[pad_id]} replaces it, also in the export"
    )
    return tokenizer.with_facts(
        pad_id=pad_id,
        vocab_size=facts.fed_vocab_size,
        special_tokens=tuple(token for token in facts.special_tokens if token.id != facts.pad_id),
        notes=(*facts.notes, note),
        exports_own_files=True,
    )


class SpecialTokens:
    """Finds special tokens in rendered text, and hides their names in texts that people wrote."""

    def __init__(self, tokens: Sequence[SpecialToken]) -> None:
        self._names = [token.content for token in tokens]
        self._by_name = {token.content: token for token in tokens}
        self._in_text = _pattern(tokens, lambda token: re.escape(token.content))
        self.pattern = _pattern(tokens, _with_stripped_space)
        """Matches a token of the template, with the white space that belongs to it."""

    def found(self, match: re.Match[str]) -> SpecialToken:
        """The token that ``pattern`` matched."""
        return self._by_name.get(match[0]) or self._by_name[match[0].strip()]

    def name_end(self, match: re.Match[str]) -> int:
        """End of the name of the token that ``pattern`` matched, before the white space that belongs to it."""
        name = self.found(match).content
        return match.start() + match[0].index(name) + len(name)

    def named_in(self, *texts: str) -> bool:
        """True if a text has the name of a token."""
        return bool(self._names) and any(self._in_text.search(text) for text in texts)

    def hide(self, value: Any) -> Any:
        """``value`` with every token's name in its texts replaced, at any depth, so that ``pattern`` doesn't match."""
        if isinstance(value, str):
            return self._in_text.sub(lambda found: f"{ESCAPE}{self._names.index(found[0])}{ESCAPE}", value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(inner) for key, inner in value.items()}
        return [self.hide(inner) for inner in value] if isinstance(value, list) else value

    def show(self, text: str) -> str:
        """The inverse of ``hide`` for a text."""
        return re.sub(f"{ESCAPE}(\\d+){ESCAPE}", lambda found: self._names[int(found[1])], text)


def _pattern(tokens: Sequence[SpecialToken], form: Callable[[SpecialToken], str]) -> re.Pattern[str]:
    """Matches any of the tokens, a longer one before its own beginning."""
    longest_first = sorted(tokens, key=lambda token: -len(token.content))
    return re.compile("|".join(form(token) for token in longest_first))


def _with_stripped_space(token: SpecialToken) -> str:
    left = r"\s*" if token.strips_left else ""
    right = r"\s*" if token.strips_right else ""
    return left + re.escape(token.content) + right
