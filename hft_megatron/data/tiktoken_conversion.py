"""Turns Llama 3's own ``tokenizer.model``, a tiktoken file, into a Hugging Face tokenizer with the same ids.

The file holds only byte strings and their ranks: the splitting of a text into words, and the special tokens after the
ranks, are Meta's published code. It is not read by the tiktoken package, which keeps a copy of every file by its path
and would continue with the copy after the file has changed.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from hft_megatron.errors import UserError

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Llama 3's pattern of a word."""
_SPECIAL_TOKENS = 256
_KNOWN_TOKENS = {
    0: BEGIN,
    1: END,
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
"""Llama 3.1's names, counted from the first id after the ranks. In 3.0 three of them were reserved."""


def is_tiktoken(content: bytes) -> bool:
    """True if the first line is a token in base64 and its rank."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content) is not None


def read_ranks(file: Path) -> dict[bytes, int]:
    """The byte strings of a tiktoken file and their ids. Raises UserError for an invalid line."""
    ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{file}:{number} is not a token in base64 and its rank; copy the file again.") from None
    return ranks


def llama3_special_tokens(first: int) -> dict[int, AddedToken]:
    """Llama 3's 256 special tokens, which have the ids from ``first`` on."""
    names = dict(_KNOWN_TOKENS)
    reserved = iter(range(_SPECIAL_TOKENS))
    for offset in range(_SPECIAL_TOKENS):
        if offset not in names:
            names[offset] = f"<|reserved_special_token_{next(reserved)}|>"
    return {first + offset: AddedToken(name, special=True, normalized=False) for offset, name in sorted(names.items())}


def tiktoken_pipeline(ranks: Mapping[bytes, int], added: Mapping[int, AddedToken]) -> RustTokenizer:
    """The tokenizer of these ranks, followed by ``added`` tokens, and reserved ones in the gaps of their ids."""
    rust = RustTokenizer(
        # A word that is a token is not split, whatever its merges: tiktoken looks it up first.
        models.BPE(vocab=_vocabulary(ranks), merges=_merges(ranks), ignore_merges=True)
    )
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rust.decoder = decoders.ByteLevel()
    first = max(ranks.values()) + 1
    rust.add_tokens(
        [
            added.get(number) or AddedToken(f"<|reserved_token_{number}|>", special=True, normalized=False)
            for number in range(first, max(added, default=0) + 1)
        ]
    )
    return rust


def _vocabulary(ranks: Mapping[bytes, int]) -> dict[str, int]:
    return {_as_text(token): rank for token, rank in ranks.items()}


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """Every split of every token into two others, the lowest rank of the joined token first."""
    ranked = [
        (rank, ranks[token[:cut]], ranks[token[cut:]])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    texts = {rank: _as_text(token) for token, rank in ranks.items()}
    return [(texts[left], texts[right]) for _, left, right in sorted(ranked)]


def _byte_characters() -> dict[int, int]:
    """GPT-2's table: the character for each byte; printable ones represent themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return {byte: byte if byte in printable else next(others) for byte in range(256)}


_CHARACTERS = _byte_characters()


def _as_text(token: bytes) -> str:
    return token.decode("latin-1").translate(_CHARACTERS)
