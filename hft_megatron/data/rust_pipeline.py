"""The tokenizers library's pipeline of a folder, made from the folder's own files, the same under every transformers.

LLaMA 1 and 2 tokenizers have no pre-tokenizer: the Rust library looks for merges in the whole text, and its own cache
of words never hits.

transformers rebuilds the pipelines of some classes from the vocabulary, so that normalizer, pre-tokenizer and begin
token depend on its version.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as RustTokenizer

from hft_megatron.data.tokenizer import SPACE_MARK, SpecialToken
from hft_megatron.data.tokenizer_files import ADDED_TOKENS_FILE, CONFIG_FILE, TOKENIZER_FILE, TokenizerFiles
from hft_megatron.errors import UserError

_BYTE = re.compile("<0x[0-9A-F]{2}>")
MAX_CHARACTERS = 2**20
"""Limit of the cached words' characters, which is 2**17 words in English, or 30 MB with their ids."""


class WordCache:
    """Encodes texts with ``start`` and, after the first word, ``inside``, which puts no mark before a text.

    ``words`` is the pattern of ``word_pattern``.
    """

    def __init__(self, words: re.Pattern[str], start: RustTokenizer, inside: RustTokenizer) -> None:
        self._pattern = words
        self._start = _Words(start)
        self._inside = _Words(inside)

    def encode_batch(self, texts: Sequence[str], *, continues: bool) -> list[list[int]]:
        """Ids of each text; if it ``continues`` another, without the mark before it."""
        cut = [self._pattern.findall(text) for text in texts]
        first = self._inside if continues else self._start
        self._inside.learn({word for words in cut for word in (words if continues else words[1:])})
        self._start.learn({words[0] for words in cut if words and not continues})
        inside = self._inside.ids
        encoded = []
        for words in cut:
            ids = list(first.ids[words[0]]) if words else []
            for word in words[1:]:
                ids += inside[word]
            encoded.append(ids)
        return encoded


class _Words:
    def __init__(self, rust: RustTokenizer) -> None:
        self.ids: dict[str, list[int]] = {}
        self._rust = rust
        self._characters = 0

    def learn(self, words: set[str]) -> None:
        """Make ``ids`` hold all of ``words``, and perhaps drop others."""
        if self._characters > MAX_CHARACTERS:
            self.ids.clear()
            self._characters = 0
        new = [word for word in words if word not in self.ids]
        encodings = self._rust.encode_batch_fast(new, add_special_tokens=False)
        self.ids.update((word, encoding.ids) for word, encoding in zip(new, encodings, strict=True))
        self._characters += sum(map(len, new))


def word_pattern(rust_json: str) -> re.Pattern[str] | None:
    """Finds the words of a text, whose ids in sequence are those of the text; None where that is not known.

    ``rust_json`` is the Rust library's text. Where no merge has a mark after another character, none crosses the start
    of a word; and none crosses a character that is in no merge, as digits and line ends are in Llama 2. That a word's
    own text decides its ids is known for the two ways in which LLaMA tokenizers mark spaces, and not assumed for
    others.
    """
    state: dict[str, Any] = json.loads(rust_json)
    model = state["model"]
    if model["type"] != "BPE":
        return None
    merged = ["".join(pair) for pair in model["merges"]]
    joined = re.escape("".join(sorted(set("".join(merged)) - {SPACE_MARK})))
    if not (
        joined
        and not model["dropout"]
        and not model["ignore_merges"]
        # Added to the tokenizer's input, which would be words instead of texts.
        and not model["continuing_subword_prefix"]
        and not model["end_of_word_suffix"]
        # Every character has ids of its own: unknown ones in a row would become one.
        and model["byte_fallback"]
        and {SPACE_MARK, *(f"<0x{byte:02X}>" for byte in range(256))} <= model["vocab"].keys()
        # Bytes that merge stand for characters that are in no merge.
        and not any(_BYTE.search(token) for token in merged)
        and not any(
            before != SPACE_MARK and after == SPACE_MARK for token in merged for before, after in pairwise(token)
        )
        and all(_only_marks(step) for step in (state["normalizer"], state["pre_tokenizer"]))
        # Any other is searched for in the text, and may hold spaces.
        and all(token["special"] for token in state["added_tokens"])
    ):
        return None
    return re.compile(rf"[ {SPACE_MARK}]+[{joined}]*|[{joined}]+|.", re.DOTALL)


def _only_marks(step: dict[str, Any] | None) -> bool:
    if step is None:
        return True
    if step["type"] == "Sequence":
        return all(map(_only_marks, step["normalizers" if "normalizers" in step else "pretokenizers"]))
    if step["type"] == "Metaspace":
        return bool(step["replacement"] == SPACE_MARK and not step["split"])
    if step["type"] == "Replace":
        return bool(step["pattern"] == {"String": " "} and step["content"] == SPACE_MARK)
    return step == {"type": "Prepend", "prepend": SPACE_MARK}


def read_pipeline(path: Path) -> RustTokenizer:
    """A tokenizer.json unchanged, without the limits that it can carry. Raises UserError where it cannot be read."""
    try:
        rust = RustTokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read by the tokenizers library ({reason}); copy it again.") from error
    rust.no_truncation()
    rust.no_padding()
    return rust


def add_tokens(rust: RustTokenizer, files: TokenizerFiles) -> None:
    """Give ``rust`` the tokens that only the files beside it have, and make special the tokens that they call so.

    Raises UserError for a token whose id is not the next free one: the library cannot give it another.
    """
    has_flags = "added_tokens_decoder" in files.config
    known = rust.get_added_tokens_decoder()
    for number, token in sorted(files.added.items()):
        held = rust.token_to_id(token.content)
        if held in known and not has_flags:
            continue
        rust.add_tokens([token])
        given = rust.token_to_id(token.content)
        if held is None and given != number:
            file = files.folder / (CONFIG_FILE if has_flags else ADDED_TOKENS_FILE)
            raise UserError(
                f"{file} gives {token.content!r} the id {number}, but the next free one is {given}; list the tokens "
                f"between them, too."
            )
    new = [name for name in files.extra if rust.token_to_id(name) is None]
    rust.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in new])
    make_special(rust, [*(token.content for token in files.names.values() if token is not None), *files.extra])


def make_special(rust: RustTokenizer, names: Sequence[str]) -> None:
    """Make those ``names`` that are in the vocabulary special tokens, which no text can produce."""
    known = rust.get_added_tokens_decoder()
    for name in names:
        number = rust.token_to_id(name)
        if number is None or (number in known and known[number].special):
            continue
        token = known.get(number, AddedToken(name, normalized=False))
        token.special = True
        rust.add_special_tokens([token])


def flags_of_added(rust: RustTokenizer) -> str:
    """The added tokens with everything that decides where they are found, for a digest."""
    return json.dumps(
        [
            [number, token.content, token.lstrip, token.rstrip, token.single_word, token.normalized, token.special]
            for number, token in sorted(rust.get_added_tokens_decoder().items())
        ]
    )


def special_tokens(rust: RustTokenizer) -> tuple[SpecialToken, ...]:
    """All special tokens of ``rust``, by id."""
    return tuple(
        SpecialToken(content=token.content, id=number, strips_left=token.lstrip, strips_right=token.rstrip)
        for number, token in sorted(rust.get_added_tokens_decoder().items())
        if token.special
    )


def names_in_text(rust: RustTokenizer) -> tuple[str, ...]:
    """Names of all added tokens of ``rust`` that are not special, by id: a text that holds one has the token."""
    return tuple(token.content for _, token in sorted(rust.get_added_tokens_decoder().items()) if not token.special)


def settle_begin_token(
    rust: RustTokenizer, names: Mapping[str, str], begins: bool | None, ends: bool | None
) -> str | None:
    """Make ``rust`` put the begin token before a text, and the end token after it, or not; None leaves it as it is.

    ``names`` has the tokens by key. Returns the token that it puts before a text, which need not be named there and is
    special from now on; None without one. Raises UserError for several.
    """
    now = _put_around(rust)
    if begins is None and len(now[0]) > 1:
        raise UserError(
            f"--tokenizer-model puts {' '.join(now[0])} before every text, but only one begin token is supported; "
            f"leave one of them in the post_processor of {TOKENIZER_FILE}."
        )
    first, last = _chosen(now[0], names.get("bos_token"), begins), _chosen(now[1], names.get("eos_token"), ends)
    if (first, last) != now:
        before, behind = "".join(f"{name} " for name in first), "".join(f" {name}" for name in last)
        rust.post_processor = processors.TemplateProcessing(
            single=f"{before}$A{behind}",
            pair=f"{before}$A{behind} {before}$B{behind}",
            special_tokens=[(name, rust.token_to_id(name)) for name in dict.fromkeys((*first, *last))],
        )
    make_special(rust, first)
    return first[0] if first else None


def _chosen(now: tuple[str, ...], name: str | None, is_put: bool | None) -> tuple[str, ...]:
    if is_put is None or (is_put and name is None):
        return now
    return (name,) if is_put and name is not None else ()


def _put_around(rust: RustTokenizer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tokens that ``rust`` itself puts before and after a text, whatever other files call them."""
    text, whole = rust.encode("a", add_special_tokens=False).tokens, rust.encode("a").tokens
    start = next(at for at in range(len(whole) + 1) if whole[at : at + len(text)] == text)
    return tuple(whole[:start]), tuple(whole[start + len(text) :])
