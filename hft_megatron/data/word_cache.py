"""Ids of a text by way of its words, each of which the tokenizer is asked for once.

LLaMA 1 and 2 tokenizers have no pre-tokenizer: the Rust library looks for merges in the whole text, and its own cache
of words never hits.
"""

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from hft_megatron.data.tokenizer import SPACE_MARK

_BYTE = re.compile("<0x[0-9A-F]{2}>")
MAX_CHARACTERS = 2**20
"""Of the words that are kept, which are 2**17 in English, or 30 MB with their ids."""


class WordCache:
    """Encodes texts with ``start`` and, behind the first word, ``inside``, which puts no mark before a text.

    ``words`` is what ``word_pattern`` says of them.
    """

    def __init__(self, words: re.Pattern[str], start: RustTokenizer, inside: RustTokenizer) -> None:
        self._pattern = words
        self._start = _Words(start)
        self._inside = _Words(inside)

    def encode_batch(self, texts: Sequence[str], *, continues: bool) -> list[list[int]]:
        """Ids of each text; of one that ``continues`` another without the mark before it."""
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
        """Make ``ids`` hold all of ``words``, and perhaps no other any more."""
        if self._characters > MAX_CHARACTERS:
            self.ids.clear()
            self._characters = 0
        new = [word for word in words if word not in self.ids]
        encodings = self._rust.encode_batch_fast(new, add_special_tokens=False)
        self.ids.update((word, encoding.ids) for word, encoding in zip(new, encodings, strict=True))
        self._characters += sum(map(len, new))


def word_pattern(rust_json: str) -> re.Pattern[str] | None:
    """Finds the words of a text, whose ids, one behind the other, are those of the text; None where that is not known.

    ``rust_json`` is what the Rust library writes. Where no merge makes a mark stand behind another character, none
    reaches over the start of a word; and none reaches a character that is in no merge, as digits and line ends are in
    Llama 2. That a word's own text is all that decides is known for the two ways in which LLaMA tokenizers mark spaces,
    and not asked of others.
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
        # Put on what the tokenizer gets, which would be words instead of texts.
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
        # Any other is looked for in the text, and may hold spaces.
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
