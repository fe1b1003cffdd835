"""What the installed transformers makes of a tokenizer folder, next to what is trained on.

Its pipelines of one folder differ between versions; a difference is told, and the export is written so that there is
none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hft_megatron.data.special_tokens import SpecialTokens
from hft_megatron.data.tokenizer import AnyTokenizer, Piece, Place, Tokenizer
from hft_megatron.data.tokenizer_files import NAME_KEYS

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
AROUND_SPECIAL = ("{}text", "{} text", "text{}", "text {} text", "{}{}\nx")
"""Forms with a special token's name in them."""


class TransformersView:
    """transformers' tokenizer of a folder, or why there is none."""

    def __init__(self, folder: Path) -> None:
        import transformers  # here, because it costs seconds that --help shouldn't

        self.version = transformers.__version__
        self.loaded: Any = None
        self.reason = ""
        try:
            self.loaded = transformers.AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # anything can be wrong with the files, and the Rust reader raises plain Exception
            self.reason = " ".join(str(error).split())[:200]

    @property
    def names(self) -> dict[str, str]:
        """Special tokens by their keys in NAME_KEYS, defaults of the folder's tokenizer class included.

        Others have keys of their own in some versions only.
        """
        if self.loaded is None:
            return {}
        return {key: str(token) for key, token in self.loaded.special_tokens_map.items() if key in NAME_KEYS}

    def compared(self, tokenizer: AnyTokenizer, file: str) -> AnyTokenizer:
        """``tokenizer``, with a line about the first difference; then an export writes its own files.

        ``file`` is where its ids are from.
        """
        difference = self.difference(tokenizer)
        if difference is None:
            return tokenizer
        note = (
            f"{tokenizer.facts.source}: the ids are those of its {file}, but transformers {difference}; an export "
            f"has tokenizer files with which it gives the same (--keep-source-tokenizer leaves the source's)"
        )
        return tokenizer.with_facts(notes=(*tokenizer.facts.notes, note), exports_own_files=True)

    def difference(self, tokenizer: Tokenizer) -> str | None:
        """A clause about the first text that transformers makes other ids of, None where there is none."""
        if self.loaded is None:
            return f"{self.version} can't load the folder ({self.reason})"
        names = [token.content for token in tokenizer.facts.special_tokens[:3]]
        texts = [*TEXTS, *(form.format(name, name) for name in names for form in AROUND_SPECIAL)]
        trained = trained_ids(tokenizer, texts)
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        for text, ids in zip(texts, trained, strict=True):
            for with_special, ours in ((False, ids), (True, begin + ids)):
                theirs = self.loaded.encode(text, add_special_tokens=with_special)
                if with_special and theirs[-1:] == [tokenizer.eos_id] and ids[-1:] != [tokenizer.eos_id]:
                    theirs = theirs[:-1]  # training puts the end token itself, behind the answer
                if theirs != ours:
                    how = "" if with_special else ", without special tokens,"
                    return f"{self.version} makes {theirs} of {text!r}{how} instead of {ours}"
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
