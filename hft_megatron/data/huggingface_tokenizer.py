"""A tokenizer from a Hugging Face folder, read by transformers without running any code from the folder.

Ids come from the Rust tokenizer inside it, used in two forms: as it is, and without its word-start mark for text that
continues other text.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from hft_megatron.data import templates
from hft_megatron.data.special_tokens import SpecialToken
from hft_megatron.data.tokenizer import Tokenizer, TokenizerFacts, choose_pad_id
from hft_megatron.data.word_cache import WordCache, word_pattern
from hft_megatron.errors import UserError

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
COPIED_FILES = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")


class HuggingFaceTokenizer(Tokenizer):
    """See Tokenizer; ``folder`` is where its files are copied from at export."""

    def __init__(self, facts: TokenizerFacts, rust_json: str, folder: Path, pad_token: str) -> None:
        super().__init__(facts)
        self._rust = _text_only(RustTokenizer.from_str(rust_json))
        self._continuing = _text_only(RustTokenizer.from_str(_without_word_start(rust_json)))
        words = word_pattern(rust_json)
        self._words = None if words is None else WordCache(words, self._rust, self._continuing)
        self._folder = folder
        self._pad_token = pad_token
        self._after_special = self._find_rule_after_special(RustTokenizer.from_str(rust_json))

    @property
    def continues_after_special(self) -> bool:
        return self._after_special

    def encode_batch(self, texts: Sequence[str], *, continues: bool) -> list[list[int]]:
        if self._words is not None:
            return self._words.encode_batch(texts, continues=continues)
        rust = self._continuing if continues else self._rust
        return [encoding.ids for encoding in rust.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._rust.decode(list(ids), skip_special_tokens=True))

    def export(self, directory: Path) -> None:
        """Copy the tokenizer's own files and add only what is missing.

        transformers' ``save_pretrained`` would write the loading machine's settings into the config and a class name
        that older versions don't know.
        """
        directory.mkdir(parents=True, exist_ok=True)
        for name in COPIED_FILES:
            if (self._folder / name).exists():
                shutil.copyfile(self._folder / name, directory / name)
        if not (directory / "tokenizer.json").exists():
            self._rust_with_special_tokens().save(str(directory / "tokenizer.json"))
        config = _read_config(self._folder) or {"tokenizer_class": "PreTrainedTokenizerFast"}
        if config.get("pad_token") is None:
            config["pad_token"] = self._pad_token
        config.pop("chat_template", None)
        for name in ("bos_token", "eos_token", "unk_token"):
            if config.get(name) is None and name in self.facts.template_variables:
                config[name] = self.facts.template_variables[name]
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (directory / TEMPLATE_FILE).write_text(self.facts.chat_template, encoding="utf-8")

    def _rust_with_special_tokens(self) -> RustTokenizer:
        rust = RustTokenizer.from_str(self._rust.to_str())
        rust.encode_special_tokens = False
        return rust

    def _find_rule_after_special(self, reference: RustTokenizer) -> bool:
        """Ask the tokenizer itself: "legacy" SentencePiece conversions mark a word start behind every special token."""
        probe = "a b"
        special = self.special(self.eos_id, trained=True)
        ids = reference.encode(special.text + probe, add_special_tokens=False).ids
        for continues in (True, False):
            if ids == [self.eos_id, *self.encode_batch([probe], continues=continues)[0]]:
                return continues
        raise UserError(
            f"--tokenizer-model {self.facts.source} changes text that follows {special.text!r} in a way that is not "
            f"understood, so trained spans could not be found exactly; use a LLaMA tokenizer."
        )


def load_huggingface_tokenizer(folder: Path, chat_template: str | None) -> HuggingFaceTokenizer:
    """Load the folder's tokenizer, with --chat-template in place of its own template where that is given.

    Raises UserError when it is unreadable, slow-only or has no end token.
    """
    from transformers import AutoTokenizer  # here, because it costs seconds that --help shouldn't

    try:
        loaded: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the Rust reader raises plain Exception for a broken tokenizer.json
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--tokenizer-model {folder} can't be read by transformers ({reason}); name a complete tokenizer folder."
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise UserError(f"--tokenizer-model {folder} has no fast tokenizer; convert it to a tokenizer.json first.")
    rust_json: str = loaded.backend_tokenizer.to_str()
    special_tokens = _special_tokens(rust_json)
    if loaded.eos_token_id not in {token.id for token in special_tokens}:
        raise UserError(
            f"--tokenizer-model {folder} names no special eos_token, but every example ends with one that is trained; "
            f"set eos_token in {CONFIG_FILE}."
        )
    pad_id = choose_pad_id(loaded.pad_token_id, loaded.unk_token_id, loaded.eos_token_id)
    facts = TokenizerFacts(
        source=str(folder),
        identity=_identity(folder, loaded),
        vocab_size=max(loaded.get_vocab().values()) + 1,
        bos_id=loaded.bos_token_id,
        eos_id=loaded.eos_token_id,
        pad_id=pad_id,
        special_tokens=special_tokens,
        chat_template=_own_template(folder, loaded.chat_template)
        if chat_template is None
        else templates.read_template(chat_template, special_tokens),
        template_variables={
            name: str(token) for name, token in loaded.special_tokens_map.items() if isinstance(token, str)
        },
    )
    return HuggingFaceTokenizer(facts, rust_json, folder, str(loaded.convert_ids_to_tokens(pad_id)))


def _identity(folder: Path, loaded: Any) -> str:
    """Hash the files, not transformers' view of them, so that another version of transformers agrees."""
    digest = hashlib.sha256()
    for name in COPIED_FILES:
        if (folder / name).exists():
            digest.update(f"{name}\n".encode() + (folder / name).read_bytes())
    digest.update(json.dumps([loaded.bos_token_id, loaded.eos_token_id]).encode())
    return digest.hexdigest()


def _special_tokens(rust_json: str) -> tuple[SpecialToken, ...]:
    return tuple(
        SpecialToken(
            content=token["content"], id=token["id"], strips_left=token["lstrip"], strips_right=token["rstrip"]
        )
        for token in json.loads(rust_json)["added_tokens"]
        if token["special"]
    )


def _own_template(folder: Path, template: object) -> str:
    """The folder's chat template; it may hold several under names, of which transformers uses ``default``."""
    if isinstance(template, dict):
        if "default" not in template:
            raise UserError(
                f"--tokenizer-model {folder} has chat templates named {', '.join(sorted(template))} but no `default`; "
                f"name the one to use `default`, or give it by --chat-template."
            )
        template = template["default"]
    return templates.DEFAULT if template is None else str(template)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _text_only(rust: RustTokenizer) -> RustTokenizer:
    """Make special tokens in a text ordinary characters, and undo limits that a tokenizer.json can carry."""
    rust.encode_special_tokens = True
    rust.no_truncation()
    rust.no_padding()
    return rust


def _without_word_start(rust_json: str) -> str:
    """The same tokenizer without the space (or its mark) that it puts before every text."""
    state = json.loads(rust_json)
    state["normalizer"] = _strip_prefix(state["normalizer"])
    state["pre_tokenizer"] = _strip_prefix(state["pre_tokenizer"])
    return json.dumps(state)


def _strip_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        kept = [stripped for inner in step[key] if (stripped := _strip_prefix(inner)) is not None]
        return {**step, key: kept}
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    return step
