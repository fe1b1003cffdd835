"""The tokenizers library's pipeline of a folder, made of the folder's own files and the same under every transformers.

transformers builds the pipelines of some classes anew from the vocabulary, so that normalizer, pre-tokenizer and begin
token depend on its version.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as RustTokenizer

from hft_megatron.data.special_tokens import SpecialToken
from hft_megatron.data.tokenizer_files import ADDED_TOKENS_FILE, CONFIG_FILE, TOKENIZER_FILE, TokenizerFiles
from hft_megatron.errors import UserError


def read_pipeline(path: Path) -> RustTokenizer:
    """A tokenizer.json as it stands, without the limits that it can carry. Raises UserError where it can't be read."""
    try:
        rust = RustTokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} can't be read by the tokenizers library ({reason}); copy it again.") from error
    rust.no_truncation()
    rust.no_padding()
    return rust


def add_tokens(rust: RustTokenizer, files: TokenizerFiles) -> None:
    """Give ``rust`` the tokens that only the files beside it have, and make special what they name so.

    Raises UserError for a token whose id is not the next free one: the library can't give it another.
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
    """Make those of ``names`` that are in the vocabulary special tokens, which no text can produce."""
    known = rust.get_added_tokens_decoder()
    for name in names:
        number = rust.token_to_id(name)
        if number is None or (number in known and known[number].special):
            continue
        token = known.get(number, AddedToken(name, normalized=False))
        token.special = True
        rust.add_special_tokens([token])


def flags_of_added(rust: RustTokenizer) -> str:
    """The added tokens with all that decides where they are found, for a digest."""
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
    """Make ``rust`` put the begin token before a text, and the end token behind it, or not; None leaves it as it is.

    ``names`` has the tokens by key. Returns the token that it puts before a text, which need not be named there and is
    special from now on; None where it puts none. Raises UserError where it puts several.
    """
    now = _put_around(rust)
    if begins is None and len(now[0]) > 1:
        raise UserError(
            f"--tokenizer-model puts {' '.join(now[0])} before every text, but only one begin token can be trained; "
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
    """Tokens that ``rust`` itself puts before and behind a text, whatever other files call them."""
    text, whole = rust.encode("a", add_special_tokens=False).tokens, rust.encode("a").tokens
    start = next(at for at in range(len(whole) + 1) if whole[at : at + len(text)] == text)
    return tuple(whole[:start]), tuple(whole[start + len(text) :])
