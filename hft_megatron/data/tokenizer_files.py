"""The JSON files of a Hugging Face tokenizer folder, and the errors in them.

They are read here and not by transformers, because its versions disagree about them, and because an empty or missing
name ends there in infinite recursion.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from hft_megatron.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATES_FOLDER = "additional_chat_templates"
COPIED_FILES = (TOKENIZER_FILE, MODEL_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE)
"""Files that decide ids, and that an export copies unchanged."""
TOKENIZER_FILES = (*COPIED_FILES, CONFIG_FILE, TEMPLATE_FILE, TEMPLATES_FOLDER)
"""All files that an export of a tokenizer may write, even if it needs fewer."""
VOCABULARY_FILES = ("vocab.json", "merges.txt", "vocab.txt")
"""Files that older classes of transformers read instead of tokenizer.json."""
NAME_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
"""Keys of the special tokens that transformers knows by name."""
_FURTHER_KEYS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
"""Keys of lists of further special tokens, or of objects that give them names for templates."""
_LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")
"""Classes, also with ``Fast`` at the end, which build their pipeline and put a begin token by rules of their own."""


@dataclass(frozen=True, kw_only=True)
class NamedToken:
    """A special token, and the place of its name."""

    content: str
    place: str
    """File and key, for error messages."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """The folder's JSON files, apart from tokenizer.json."""

    folder: Path
    config: Mapping[str, Any]
    """tokenizer_config.json; empty where there is none."""
    names: Mapping[str, NamedToken | None]
    """Special tokens by their keys in NAME_KEYS; None where a file says that there is none."""
    added: Mapping[int, AddedToken]
    """Tokens that the files add to the vocabulary, or name in it, by id."""
    extra: tuple[str, ...]
    """Further special tokens, which have no id in these files."""
    variables: Mapping[str, str]
    """Names under which templates use some of the further ones, such as ``image_token``."""
    reads_folder: bool
    """False where a single file was given and the files beside it are not read."""

    @property
    def names_pad(self) -> bool:
        """True if a file names a pad token, which the vocabulary may lack, or none names any special token."""
        return self.names.get("pad_token") is not None or not (self.config or self.names)

    def resolve_names(self, is_known: Callable[[str], bool], defaults: Mapping[str, str]) -> dict[str, str]:
        """The special tokens by key that are in the vocabulary: the files', and ``defaults`` where they are silent.

        Raises UserError for a begin, end or unknown token of the files that the vocabulary lacks.
        """
        for key, token in self.names.items():
            if token is not None and key in ("bos_token", "eos_token", "unk_token") and not is_known(token.content):
                raise UserError(
                    f"{token.place} is {token.content!r}, which is not in the tokenizer's vocabulary; name one of its "
                    f"tokens, or remove the key."
                )
        own = {key: None if token is None else token.content for key, token in self.names.items()}
        return {key: name for key, name in {**defaults, **own}.items() if name is not None and is_known(name)}

    def notes(self, is_known: Callable[[str], bool]) -> tuple[str, ...]:
        """A line about a pad token that the vocabulary lacks; it is never fed, so another replaces it."""
        pad = self.names.get("pad_token")
        if pad is None or is_known(pad.content):
            return ()
        return (f"{pad.place} is {pad.content!r}, which is not in the tokenizer's vocabulary; another pad is used",)

    @property
    def has_llama_class(self) -> bool:
        """True if the tokenizer's class is one whose pipeline depends on the version of transformers."""
        return str(self.config.get("tokenizer_class")).removesuffix("Fast") in _LLAMA_CLASSES

    def explicit(self, key: str) -> bool | None:
        """``add_bos_token`` or ``add_eos_token`` where the tokenizer's class uses it, else None."""
        value = self.config.get(key)
        return value if self.has_llama_class and isinstance(value, bool) else None


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read the folder's JSON files that exist.

    Raises UserError for one that isn't a JSON object and for a special token that is empty or not text.
    """
    config = _read_object(folder / CONFIG_FILE)
    named = {CONFIG_FILE: config}
    if "added_tokens_decoder" not in config:  # transformers' rule: with it, the older files are not read
        named[SPECIAL_TOKENS_FILE] = _read_object(folder / SPECIAL_TOKENS_FILE)
    names: dict[str, NamedToken | None] = {}
    for file, values in named.items():
        for key in NAME_KEYS:
            if key in values:
                names[key] = _named(folder / file, key, values[key])
        _refuse_empty(folder / file, [key for key, token in names.items() if token is not None and not token.content])
    further = [values.get(key) for values in named.values() for key in _FURTHER_KEYS]
    extra = [token for value in further for token in _listed(value)]
    variables = {
        key: token
        for value in further
        if isinstance(value, dict)
        for key, each in value.items()
        for token in _listed([each])
        if key not in NAME_KEYS
    }
    special = {token.content for token in names.values() if token is not None} | set(extra)
    return TokenizerFiles(
        folder=folder,
        config=config,
        names=names,
        added=_added_tokens(folder, config, special),
        extra=tuple(dict.fromkeys(extra)),
        variables=variables,
        reads_folder=True,
    )


def no_files(folder: Path) -> TokenizerFiles:
    """The facts of a single file, whatever is beside it in its folder."""
    return TokenizerFiles(folder=folder, config={}, names={}, added={}, extra=(), variables={}, reads_folder=False)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; copy it again.")
    return content


def _named(path: Path, key: str, value: object) -> NamedToken | None:
    content = value.get("content") if isinstance(value, dict) else value
    if value is None:
        return None
    place = f"{path}: {key}"
    if not isinstance(content, str):
        raise UserError(f"{place} is {json.dumps(value)}; give the token's text, or remove the key.")
    return NamedToken(content=content, place=place)


def _refuse_empty(path: Path, keys: Sequence[str]) -> None:
    if keys:
        raise UserError(
            f"{path}: {', '.join(keys)} {'is' if len(keys) == 1 else 'are'} empty; give the text of a token of the "
            f"vocabulary, such as </s> for eos_token, or remove the key."
        )


def _listed(value: object) -> list[str]:
    """Texts of a list of tokens, or of an object whose values are tokens."""
    values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    contents = [each.get("content") if isinstance(each, dict) else each for each in values]
    return [content for content in contents if isinstance(content, str) and content]


def _added_tokens(folder: Path, config: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    path = folder / CONFIG_FILE
    try:
        if "added_tokens_decoder" in config:
            return {
                int(number): AddedToken(**{key: value for key, value in token.items() if key != "__type"})
                for number, token in config["added_tokens_decoder"].items()
            }
        path = folder / ADDED_TOKENS_FILE
        return {
            int(number): AddedToken(content, special=content in special, normalized=content not in special)
            for content, number in _read_object(path).items()
        }
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} has added tokens that cannot be read ({error}); copy it again.") from error
