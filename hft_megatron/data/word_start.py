"""Text that continues other text, encoded without the space (or mark) that some tokenizers put before a text."""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from hft_megatron.data.sentencepiece_conversion import SPACES_AT_START

_GUARD = "\ue000"
"""Stands for the text before: no white space, no letter, and in no token's name."""


class ContinuingPipeline:
    """``start``, the whole pipeline of a tokenizer, for texts that continue others.

    What stands behind an added token is a text of its own to the Rust library, with whatever mark that gets; only what
    is before the first one continues.
    """

    def __init__(self, start: RustTokenizer) -> None:
        self._start = start
        self.head = _without_word_start(start)
        """For the text before the first added token; ``start`` itself where that puts no mark."""
        added = start.get_added_tokens_decoder()
        self._added = frozenset(number for number, token in added.items() if not token.special)

    @property
    def differs_behind_added(self) -> bool:
        """Whether a text can hold an added token behind which the rule is another than before it."""
        return self.head is not self._start and bool(self._added)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without beginning or end token."""
        if not self.differs_behind_added:
            return _encode(self.head, texts)
        # encode_batch_fast has no offsets
        whole = self._start.encode_batch([_GUARD + text for text in texts], add_special_tokens=False)
        firsts = [
            next((position for position, number in enumerate(encoding.ids) if number in self._added), len(encoding.ids))
            for encoding in whole
        ]
        heads = [
            text if first == len(encoding.ids) else text[: max(encoding.offsets[first][0] - len(_GUARD), 0)]
            for text, encoding, first in zip(texts, whole, firsts, strict=True)
        ]
        return [
            head + encoding.ids[first:]
            for head, encoding, first in zip(_encode(self.head, heads), whole, firsts, strict=True)
        ]


def _encode(rust: RustTokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in rust.encode_batch_fast(list(texts), add_special_tokens=False)]


def _without_word_start(rust: RustTokenizer) -> RustTokenizer:
    """The same tokenizer without its mark and its added tokens; ``rust`` if it puts no mark."""
    state = json.loads(rust.to_str())
    stripped = {key: _strip_prefix(state[key]) for key in ("normalizer", "pre_tokenizer")}
    if all(state[key] == step for key, step in stripped.items()):
        return rust
    # A name that is sought in normalized text has the mark before it, and would be found elsewhere without.
    special = [token for token in state["added_tokens"] if token["special"]]
    other = RustTokenizer.from_str(json.dumps({**state, **stripped, "added_tokens": special}))
    other.encode_special_tokens = True
    return other


def _strip_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Replace" and step["pattern"] == {"Regex": SPACES_AT_START}:
        return None
    if step["type"] == "Strip":
        return {**step, "strip_left": False}
    if step["type"] == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        kept = [stripped for inner in step[key] if (stripped := _strip_prefix(inner)) is not None]
        return {**step, key: kept}
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    return step
