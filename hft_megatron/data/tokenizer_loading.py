"""Finds out the kind of tokenizer at a path and loads it."""

from pathlib import Path

from hft_megatron.data.huggingface_tokenizer import load_huggingface_tokenizer, load_tiktoken_tokenizer
from hft_megatron.data.sentencepiece_tokenizer import load_sentencepiece_tokenizer
from hft_megatron.data.tiktoken_conversion import is_tiktoken
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_files import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    MODEL_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    TEMPLATES_FOLDER,
    TOKENIZER_FILE,
    TokenizerFiles,
    no_files,
    read_tokenizer_files,
)
from hft_megatron.errors import UserError

HUGGING_FACE = "HuggingFaceTokenizer"
SENTENCEPIECE = "SentencePieceTokenizer"
HUGGING_FACE_FILES = (TOKENIZER_FILE, CONFIG_FILE)
_BESIDE_MODEL = (SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE, TEMPLATE_FILE, TEMPLATES_FOLDER)
"""Files that transformers reads beside a ``.model`` file even without a config."""


def load_tokenizer(tokenizer_type: str | None, path: str | Path, chat_template: str | None = None) -> Tokenizer:
    """Load the tokenizer at ``path``: a Hugging Face folder, or a ``.model`` file (or its folder).

    Without a type, a folder with any of Hugging Face's tokenizer files is Hugging Face's; anything else is a file of
    SentencePiece or, as Llama 3 has it, tiktoken. ``chat_template`` is --chat-template, the tokenizer's own when
    None. Raises UserError for a path that is missing, unreadable or of another kind, and for errors in the files.
    """
    path = Path(path)
    if tokenizer_type not in (None, HUGGING_FACE, SENTENCEPIECE):
        raise UserError(f"--tokenizer-type {tokenizer_type} is not known; use {HUGGING_FACE} or {SENTENCEPIECE}.")
    if not path.exists():
        raise UserError(f"--tokenizer-model {path} does not exist; name a Hugging Face folder or a .model file.")
    kind = tokenizer_type or _find_kind(path)
    if kind == HUGGING_FACE:
        if not path.is_dir():
            raise UserError(f"--tokenizer-model {path} is a file, but {HUGGING_FACE} needs the folder that holds it.")
        files = read_tokenizer_files(path)
        if (path / TOKENIZER_FILE).exists() or not (path / MODEL_FILE).exists():
            return load_huggingface_tokenizer(files, chat_template)
        return _load_model_file(path / MODEL_FILE, files, chat_template)
    file = path / MODEL_FILE if path.is_dir() else path
    if not file.exists():
        raise UserError(f"--tokenizer-model {path} has no {MODEL_FILE}, which {SENTENCEPIECE} needs.")
    if tokenizer_type == SENTENCEPIECE:
        return load_sentencepiece_tokenizer(file, no_files(file.parent), chat_template)
    return _load_model_file(file, no_files(file.parent), chat_template)


def _load_model_file(file: Path, files: TokenizerFiles, chat_template: str | None) -> Tokenizer:
    with file.open("rb") as content:
        holds_ranks = is_tiktoken(content.readline(1000))
    load = load_tiktoken_tokenizer if holds_ranks else load_sentencepiece_tokenizer
    return load(file, files, chat_template)


def holds_tokenizer(path: str | Path) -> bool:
    """True if ``path`` is a tokenizer file or a folder with one."""
    path = Path(path)
    return path.is_file() or any((path / name).exists() for name in (*HUGGING_FACE_FILES, MODEL_FILE))


def _find_kind(path: Path) -> str:
    if not path.is_dir():
        return SENTENCEPIECE
    if any((path / name).exists() for name in HUGGING_FACE_FILES):
        return HUGGING_FACE
    if (path / MODEL_FILE).exists():
        return HUGGING_FACE if any((path / name).exists() for name in _BESIDE_MODEL) else SENTENCEPIECE
    raise UserError(
        f"--tokenizer-model {path} holds no tokenizer: it needs tokenizer.json (Hugging Face) or {MODEL_FILE}."
    )
