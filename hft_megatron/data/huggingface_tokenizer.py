"""A tokenizer from a Hugging Face folder, as the folder's own files have it; no code of the folder is run.

Ids come from the Rust tokenizer, used in two forms: as it is, and without its word-start mark for text that continues
other text.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from hft_megatron.data import rust_pipeline
from hft_megatron.data.rust_pipeline import WordCache, word_pattern
from hft_megatron.data.sentencepiece_conversion import SPACES_AT_START
from hft_megatron.data.templates import choose_template
from hft_megatron.data.tiktoken_conversion import BEGIN, END, llama3_special_tokens, read_ranks, tiktoken_pipeline
from hft_megatron.data.tokenizer import Tokenizer, TokenizerFacts, choose_pad_id, fed_vocab_size
from hft_megatron.data.tokenizer_export import FILE_CLASS, TransformersView, copy_files, write_files
from hft_megatron.data.tokenizer_files import CONFIG_FILE, COPIED_FILES, TOKENIZER_FILE, TokenizerFiles
from hft_megatron.errors import UserError

_GUARD = "\ue000"
"""Represents the text before: no white space, no letter, and in no token's name."""


class ContinuingPipeline:
    """``start``, the whole pipeline of a tokenizer, for texts that continue others.

    To the Rust library the text after an added token is a text of its own, with the mark that a text gets; only the
    text before the first one continues.
    """

    def __init__(self, start: RustTokenizer) -> None:
        self._start = start
        self.head = _without_word_start(start)
        """Tokenizer for the text before the first added token; ``start`` itself where it puts no mark."""
        added = start.get_added_tokens_decoder()
        self._added = frozenset(number for number, token in added.items() if not token.special)

    @property
    def differs_after_added(self) -> bool:
        """True if a text can hold an added token after which the rule differs from before it."""
        return self.head is not self._start and bool(self._added)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without beginning or end token."""
        if not self.differs_after_added:
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
    # A name that is searched in normalized text has the mark before it, and would be found elsewhere without.
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


class HuggingFaceTokenizer(Tokenizer):
    """See Tokenizer; ``rust`` is the whole pipeline, and ``files`` are those beside it, which an export copies."""

    def __init__(self, facts: TokenizerFacts, rust: RustTokenizer, files: TokenizerFiles) -> None:
        super().__init__(facts)
        self._rust = rust
        self._files = files
        rust.encode_special_tokens = True
        self._continuing = ContinuingPipeline(rust)
        words = word_pattern(rust.to_str())
        self._words = None if words is None else WordCache(words, rust, self._continuing.head)
        if rust.normalizer is not None:
            self._normalize = rust.normalizer.normalize_str
            if not self._lost_at_end(" "):
                self._normalize = None
        self._after_special = self._find_rule_after_special()

    @property
    def continues_after_special(self) -> bool:
        return self._after_special

    def encode_batch(self, texts: Sequence[str], *, continues: bool) -> list[list[int]]:
        if self._words is not None:
            return self._words.encode_batch(texts, continues=continues)
        if continues:
            return self._continuing.encode_batch(texts)
        return [encoding.ids for encoding in self._rust.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._rust.decode(list(ids), skip_special_tokens=True))

    def export(self, directory: Path, *, keep_source: bool = False, adds_template: bool = True) -> list[str]:
        if keep_source or not self.facts.exports_own_files:
            return copy_files(directory, self._files, self.facts, self._rust, adds_template=adds_template)
        return write_files(directory, self._files, self, self._rust, adds_template=adds_template)

    def _find_rule_after_special(self) -> bool:
        """Ask the tokenizer itself: "legacy" SentencePiece conversions mark a word start after every special token."""
        probe = "a b"
        special = self.special(self.eos_id, trained=True)
        self._rust.encode_special_tokens = False
        ids = self._rust.encode(special.text + probe, add_special_tokens=False).ids
        self._rust.encode_special_tokens = True
        for continues in (True, False):
            if ids == [self.eos_id, *self.encode_batch([probe], continues=continues)[0]]:
                return continues
        raise UserError(
            f"--tokenizer-model {self.facts.source} changes text after {special.text!r} in an unknown way, so trained "
            f"spans cannot be found exactly; use a LLaMA tokenizer."
        )


def load_huggingface_tokenizer(files: TokenizerFiles, chat_template: str | None) -> HuggingFaceTokenizer:
    """The tokenizer of a folder with a tokenizer.json, or with other files that transformers converts to one.

    ``chat_template`` is --chat-template. Raises UserError for files that cannot be read and for a tokenizer without an
    end token.
    """
    folder = files.folder
    view = TransformersView(folder)
    if (folder / TOKENIZER_FILE).exists():
        rust = rust_pipeline.read_pipeline(folder / TOKENIZER_FILE)
        before = rust_pipeline.flags_of_added(rust)
        rust_pipeline.add_tokens(rust, files)
        identity = _identity(files)
        if (after := rust_pipeline.flags_of_added(rust)) != before:
            identity.append(after)
        of_file = rust.encode("a").ids
        tokenizer = _assembled(rust, files, view.names, identity, chat_template, source=str(folder))
        # Versions 4 put another begin token than the file, and later ones of 5 drop a normalizer, without a difference
        # in the installed version.
        varies = files.has_llama_class and (rust.normalizer is not None or rust.encode("a").ids != of_file)
        return view.compared(tokenizer.with_facts(exports_own_files=varies), TOKENIZER_FILE)
    if view.loaded is None:
        raise UserError(
            f"--tokenizer-model {folder} cannot be read by transformers ({view.reason}); name a complete tokenizer "
            f"folder."
        )
    if not getattr(view.loaded, "is_fast", False):
        raise UserError(f"--tokenizer-model {folder} has no fast tokenizer; convert it to a {TOKENIZER_FILE} first.")
    rust = view.loaded.backend_tokenizer
    return _assembled(rust, files, view.names, [rust.to_str()], chat_template, source=str(folder))


def load_tiktoken_tokenizer(file: Path, files: TokenizerFiles, chat_template: str | None) -> HuggingFaceTokenizer:
    """The tokenizer of Llama 3's own ``tokenizer.model``, with the special tokens that ``files`` list, or Llama 3's."""
    ranks = read_ranks(file)
    first = max(ranks.values()) + 1
    added = {number: token for number, token in files.added.items() if number >= first}
    rust = tiktoken_pipeline(ranks, added or llama3_special_tokens(first))
    rust_pipeline.add_tokens(rust, files)
    identity: list[str | bytes] = [file.read_bytes(), rust_pipeline.flags_of_added(rust)]
    begins = files.config.get("add_bos_token", True)
    source = str(files.folder if files.reads_folder else file)
    tokenizer = _assembled(
        rust, files, {"bos_token": BEGIN, "eos_token": END}, identity, chat_template, source=source, begins=bool(begins)
    )
    notes = tokenizer.facts.notes
    if not added:
        notes += (f"{source}: Llama 3's 256 special tokens are used, as no file lists any",)
    return tokenizer.with_facts(notes=notes, exports_own_files=True)


def _assembled(
    rust: RustTokenizer,
    files: TokenizerFiles,
    defaults: Mapping[str, str],
    identity: Sequence[str | bytes],
    chat_template: str | None,
    *,
    source: str,
    begins: bool | None = None,
) -> HuggingFaceTokenizer:
    def is_known(name: str) -> bool:
        return rust.token_to_id(name) is not None

    names = files.resolve_names(is_known, defaults)
    rust_pipeline.make_special(rust, list(names.values()))
    ids = {key: number for key, name in names.items() if (number := rust.token_to_id(name)) is not None}
    eos_id = ids.get("eos_token")
    if eos_id is None:
        raise UserError(
            f"--tokenizer-model {source} names no special eos_token, but every example ends with a trained one; "
            f"set eos_token in {CONFIG_FILE}."
        )
    if begins is None:
        begins = files.explicit("add_bos_token")
    begin = rust_pipeline.settle_begin_token(rust, names, begins, files.explicit("add_eos_token"))
    bos_id = None if begin is None else rust.token_to_id(begin)
    if ContinuingPipeline(rust).differs_after_added:
        identity = [*identity, "a text that continues another has its word starts behind added tokens"]
    special_tokens = rust_pipeline.special_tokens(rust)
    vocabulary = rust.get_vocab().values()
    facts = TokenizerFacts(
        source=source,
        identity=_digest([*identity, json.dumps([bos_id, eos_id])]),
        vocab_size=max(vocabulary) + 1,
        fed_vocab_size=fed_vocab_size(vocabulary, ids),
        bos_id=bos_id,
        eos_id=eos_id,
        names_pad=files.names_pad or "pad_token" in names,
        pad_id=choose_pad_id(ids.get("pad_token"), ids.get("unk_token"), eos_id),
        special_tokens=special_tokens,
        names_in_text=rust_pipeline.names_in_text(rust),
        chat_template=choose_template(chat_template, files, special_tokens),
        template_variables={**files.variables, **names},
        notes=files.notes(is_known),
    )
    return HuggingFaceTokenizer(facts, rust, files)


def _identity(files: TokenizerFiles) -> list[str | bytes]:
    """Identity of the files and not of the Rust tokenizer, whose form depends on its version.

    For the class that every transformers reads unchanged, this equals the value of earlier versions of the project.
    """
    parts: list[str | bytes] = []
    for name in COPIED_FILES:
        if (files.folder / name).exists():
            parts.append(f"{name}\n".encode() + (files.folder / name).read_bytes())
    if files.config.get("tokenizer_class") != FILE_CLASS:
        parts.append(f"the folder's own {TOKENIZER_FILE}")
    return parts


def _digest(parts: Sequence[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()
