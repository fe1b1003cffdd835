"""Texts on which two tokenizers are compared: what is trained on, and what the files of a folder or an export give."""

from collections.abc import Callable, Sequence

from hft_megatron.data.special_tokens import SpecialTokens
from hft_megatron.data.tokenizer import Piece, Place, Tokenizer

TEXTS = (
    "Hello world",
    " leading",
    "",
    " ",
    "  two leading and trailing  ",
    "a  b   c",
    "line\nends\r\n\n\n behind",
    "\n\n",
    "\ttab\t\tstops",
    "0 12 345 6789 3.14",
    "it's I'LL _x_ `y`",
    "Größe, façade, naïve",
    "日本語の文章。한국어",
    "🙂 👩‍🚀 🇩🇪",
    "\uff26\uff35\uff2c\uff2c\u3000\uff57idth \ufb01ne ½",
    "zero\u200bwidth\ufeff nb\u00a0sp",
    "▁mark ▁▁",
    "<0x0A> [INST] <<SYS>>",
)
"""Where tokenizers are known to differ: white space, digits, scripts, and characters that are normalized."""
AROUND_NAME = ("{}text", "{} text", "text{}", "text {} text", "text{}text", "  {}  ", "{}{}\nx")
"""Forms with the name of a token in them."""
_SPECIAL, _IN_TEXT = 3, 8
"""Names that are tried of special tokens, which are alike, and of those that a text may hold."""


def first_difference(tokenizer: Tokenizer, encode: Callable[[str, bool], list[int]]) -> str | None:
    """A clause about the first text of which ``encode`` makes other ids than are trained; None where there is none.

    ``encode`` takes a text and whether begin and end tokens are put around it.
    """
    facts = tokenizer.facts
    names = [*(token.content for token in facts.special_tokens[:_SPECIAL]), *facts.names_in_text[:_IN_TEXT]]
    texts = [*TEXTS, *(form.format(name, name) for name in names for form in AROUND_NAME)]
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for text, ids in zip(texts, trained_ids(tokenizer, texts), strict=True):
        for with_special, ours in ((False, ids), (True, begin + ids)):
            theirs = encode(text, with_special)
            if with_special and theirs == [*ours, tokenizer.eos_id]:
                continue  # training puts the end token itself, behind the answer
            if theirs != ours:
                how = "" if with_special else ", without special tokens,"
                return f"makes {theirs} of {text!r}{how} instead of {ours}"
    return _difference_inside(tokenizer, lambda text: encode(text, False))


def _difference_inside(tokenizer: Tokenizer, encode: Callable[[str], list[int]]) -> str | None:
    """The same for a text that continues another, which begins with a token's name as no merge reaches over that."""
    for name in tokenizer.facts.names_in_text[:_IN_TEXT]:
        before, text = "a", f"{name}b {name} c"
        theirs = encode(before + text)
        start = tokenizer.encode(before)
        ours = start + tokenizer.encode_batch([text], continues=True)[0]
        # A name that is not found behind a letter is text, which is cut elsewhere when it is whole.
        if theirs[: len(start)] == start and theirs != ours:
            return f"makes {theirs} of {before + text!r}, without special tokens, instead of {ours}"
    return None


def trained_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text in which the names of special tokens are those tokens, as in a rendered conversation."""
    special = SpecialTokens(tokenizer.facts.special_tokens)
    return [ids.tolist() for ids, _ in tokenizer.encode_pieces([_pieces(special, text) for text in texts])]


def _pieces(special: SpecialTokens, text: str) -> list[Piece]:
    pieces: list[Piece] = []
    position = 0
    for found in special.pattern.finditer(text):
        pieces += _plain(text[position : found.start()], after_special=bool(pieces))
        pieces.append(Piece(text=special.found(found).content, place=Place.SPECIAL, trained=False))
        position = found.end()
    return pieces + _plain(text[position:], after_special=bool(pieces))


def _plain(text: str, *, after_special: bool) -> list[Piece]:
    place = Place.AFTER_SPECIAL if after_special else Place.START
    return [Piece(text=text, place=place, trained=False)] if text else []
