"""A tokenizer from a SentencePiece ``tokenizer.model``, the format LLaMA 1 and 2 and our demo come with.

The sentencepiece library makes the ids; the export is a conversion that gives the same ids in transformers. Beside the
file a Hugging Face folder may have JSON files, which name special tokens and add some to the vocabulary.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from hft_megatron.data.sentencepiece_conversion import to_rust_tokenizer
from hft_megatron.data.sentencepiece_model import Vocabulary, read_vocabulary
from hft_megatron.data.templates import choose_template
from hft_megatron.data.tokenizer import Tokenizer, TokenizerFacts, choose_pad_id, fed_vocab_size
from hft_megatron.data.tokenizer_export import TransformersView, copy_files, pipeline_difference, write_files
from hft_megatron.data.tokenizer_files import CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE, TokenizerFiles
from hft_megatron.errors import UserError

_SPACE = r"[^\S\x1c-\x1f]*"
"""White space by the library's definition: Python includes four separators."""
_BEFORE, _BEHIND = re.compile(rf"{_SPACE}\Z"), re.compile(_SPACE)


class AddedTokens:
    """Added tokens by id, found in a text by their names, with the white space that belongs to them."""

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        self._ids = {token.content: number for number, token in tokens.items()}
        self._tokens = {token.content: token for token in tokens.values()}
        names = sorted(self._ids, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names))) if names else None

    def cut(self, text: str) -> list[str | int]:
        """The text in order: ids of tokens, and the texts between them, never empty."""
        parts: list[str | int] = []
        position = 0
        for found in self._names.finditer(text) if self._names else ():
            token = self._tokens[found[0]]
            start, end = found.span()
            if token.single_word and (re.match(r"\w", text[start - 1 : start]) or re.match(r"\w", text[end : end + 1])):
                continue
            if token.lstrip and (space := _BEFORE.search(text, position, start)):
                start = space.start()
            if token.rstrip and (space := _BEHIND.match(text, end)):
                end = space.end()
            parts += [text[position:start]] if start > position else []
            parts.append(self._ids[found[0]])
            position = end
        return parts + ([text[position:]] if position < len(text) else [])


class SentencePieceTokenizer(Tokenizer):
    """See Tokenizer. Control pieces such as ``</s>`` never come from a text: the library itself ensures that."""

    def __init__(
        self, facts: TokenizerFacts, vocabulary: Vocabulary, rust: RustTokenizer, file: Path, files: TokenizerFiles
    ) -> None:
        super().__init__(facts)
        self._vocabulary = vocabulary
        self._rust = rust
        self._file = file
        self._files = files
        # The library cannot switch its rules per call, so there is a processor for each way to begin.
        self._processor = vocabulary.processor()
        self._continuing = vocabulary.processor(add_dummy_prefix=False)
        if vocabulary.removes_spaces:
            self._spaced = vocabulary.processor(add_dummy_prefix=True)
            self._normalize = vocabulary.processor(add_dummy_prefix=False).normalize
            self._spacing = vocabulary.processor(
                add_dummy_prefix=False, remove_extra_whitespaces=False, escape_whitespaces=False
            )
        self._added = AddedTokens(vocabulary.found_in_text)

    @property
    def continues_after_special(self) -> bool:
        return False  # as in the exported files, and in LLaMA's first code, which encoded every turn on its own

    def encode_batch(self, texts: Sequence[str], *, continues: bool) -> list[list[int]]:
        if not self._vocabulary.found_in_text:
            return self._encode(texts, continues=continues)
        return [self._encode_with_added(text, continues=continues) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        size = self._processor.get_piece_size()
        text, run = "", list[int]()
        for token in [int(token) for token in ids]:
            if token < size:
                run.append(token)
                continue
            is_special = self._vocabulary.added[token].special
            text += str(self._processor.decode(run)) + ("" if is_special else self._vocabulary.names[token])
            run = []
        return text + str(self._processor.decode(run))

    def export(self, directory: Path, *, keep_source: bool = False, adds_template: bool = True) -> list[str]:
        if keep_source and self._files.reads_folder:
            return copy_files(directory, self._files, self.facts, self._rust, adds_template=adds_template)
        lines = write_files(directory, self._files, self, self._rust, adds_template=adds_template)
        shutil.copyfile(self._file, directory / MODEL_FILE)
        return lines

    def _encode(self, texts: Sequence[str], *, continues: bool) -> list[list[int]]:
        if not continues:
            started: list[list[int]] = self._processor.encode(list(texts))
            return started
        encoded: list[list[int]] = self._continuing.encode(list(texts))
        if self._vocabulary.removes_spaces:
            # At the start of a text spaces are removed, but between two parts of one text a single one stays.
            for position, text in enumerate(texts):
                if self._spacing.normalize(text).startswith(" "):
                    encoded[position] = self._spaced.encode(text)
        return encoded

    def _encode_with_added(self, text: str, *, continues: bool) -> list[int]:
        """Added tokens are found in the text; the texts between them are encoded on their own, as in transformers."""
        ids: list[int] = []
        for part in self._added.cut(text):
            ids += [part] if isinstance(part, int) else self._encode([part], continues=continues)[0]
            continues = self.continues_after_special
        return ids


def load_sentencepiece_tokenizer(
    file: Path, files: TokenizerFiles, chat_template: str | None
) -> SentencePieceTokenizer:
    """Load a ``.model`` file with the special and added tokens that ``files`` name.

    ``chat_template`` is --chat-template. Raises UserError when it isn't such a file, cannot be exported or has no end
    token.
    """
    vocabulary = read_vocabulary(file, files)
    names = files.resolve_names(lambda name: vocabulary.id_of(name) is not None, vocabulary.named)
    ids = {key: number for key, name in names.items() if (number := vocabulary.id_of(name)) is not None}
    if "eos_token" not in ids:
        raise UserError(
            f"--tokenizer-model {file} has no end piece, which every example ends with; train one with it, or name one "
            f"by eos_token in {CONFIG_FILE}."
        )
    eos_id = ids["eos_token"]
    pad_id = choose_pad_id(ids.get("pad_token"), vocabulary.unknown_id, eos_id)
    puts_begin = "bos_token" in ids and bool(files.config.get("add_bos_token", True))
    bos_id = ids["bos_token"] if puts_begin else None
    if not files.reads_folder:
        names["pad_token"] = vocabulary.names[pad_id]
    special_tokens = vocabulary.special_tokens
    facts = TokenizerFacts(
        source=str(files.folder if files.reads_folder else file),
        identity=_identity(file, vocabulary, json.dumps([bos_id, eos_id]) if files.reads_folder else ""),
        vocab_size=len(vocabulary.names),
        fed_vocab_size=fed_vocab_size(range(len(vocabulary.names)), ids),
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=pad_id,
        names_pad=files.names_pad or "pad_token" in names,
        special_tokens=special_tokens,
        names_in_text=(*vocabulary.defined, *(token.content for token in vocabulary.found_in_text.values())),
        chat_template=choose_template(chat_template, files, special_tokens),
        template_variables={**files.variables, **names},
        notes=files.notes(lambda name: vocabulary.id_of(name) is not None),
        exports_own_files=True,
    )
    rust = to_rust_tokenizer(vocabulary, bos_id=bos_id)
    tokenizer = SentencePieceTokenizer(facts, vocabulary, rust, file, files)
    if difference := pipeline_difference(tokenizer, rust):
        note = f"{facts.source}: an export's {TOKENIZER_FILE} {difference}; it cannot reproduce SentencePiece there"
        tokenizer = tokenizer.with_facts(notes=(*facts.notes, note))
    return TransformersView(files.folder).compared(tokenizer, MODEL_FILE) if files.reads_folder else tokenizer


def _identity(file: Path, vocabulary: Vocabulary, of_files: str) -> str:
    """Identity; for a single file that keeps spaces, it equals the value of earlier versions of the project."""
    digest = hashlib.sha256(file.read_bytes())
    if vocabulary.removes_spaces:
        digest.update(b"a space between two parts of a text stays, on either side")
    if of_files:
        digest.update(of_files.encode())
        for special in vocabulary.special_tokens:
            digest.update(f"{special}".encode())
        for number, token in vocabulary.found_in_text.items():
            flags = [number, token.content, token.lstrip, token.rstrip, token.single_word]
            digest.update(json.dumps(flags).encode())
    return digest.hexdigest()
