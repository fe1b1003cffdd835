"""Where the export of a SentencePiece model cuts a text first, so that it finds the pieces that SentencePiece finds.

The tokenizers library looks up what SentencePiece never does: control pieces and names of bytes that a text spells out.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from tokenizers import Regex, pre_tokenizers

from hft_megatron.data.sentencepiece_model import BPE, NORMAL, USER_DEFINED, Vocabulary


def cuts(vocabulary: Vocabulary) -> list[pre_tokenizers.PreTokenizer]:
    """Steps for normalized text, none where the model alone finds the same pieces.

    Those of BPE expect a model that looks a stretch up as a whole before it merges (``ignore_merges``).
    """
    if vocabulary.proto.trainer_spec.model_type != BPE:
        return _split(_names_in_two(vocabulary), "merged_with_previous")
    if not vocabulary.defined:
        return []
    # As added tokens they would begin the text behind them anew, with a mark that SentencePiece doesn't put there.
    longest_first = sorted(vocabulary.defined, key=len, reverse=True)
    around_defined = _split(map(re.escape, longest_first), "isolated")
    return [*around_defined, *_split(_stretches_in_two(vocabulary), "isolated")]


def _stretches_in_two(vocabulary: Vocabulary) -> Iterator[str]:
    """Patterns of the first part of every stretch that is a piece's name but no single token of a text.

    The library itself cuts there, so that no merge reaches over the cut.
    """
    processor = vocabulary.processor(
        add_dummy_prefix=False, remove_extra_whitespaces=False, precompiled_charsmap=b"", escape_whitespaces=True
    )
    names = [piece.piece for piece in vocabulary.proto.pieces]
    for number, (name, ids) in enumerate(zip(names, processor.encode(names), strict=True)):
        if ids != [number] and len(name) > 1:
            first = names[ids[0]]  # no text where it is a byte of the first character
            head = first if name.startswith(first) and first != name else name[0]
            yield rf"\A{re.escape(head)}(?={re.escape(name[len(head) :])}\z)"


def _names_in_two(vocabulary: Vocabulary) -> Iterator[str]:
    """Patterns of the first part of every name that no text has as a token, where no piece can reach over the cut."""
    found = [piece.piece for piece in vocabulary.proto.pieces if piece.type in (NORMAL, USER_DEFINED)]
    joined = {pair for piece in found for pair in pairwise(piece)}
    for piece in vocabulary.proto.pieces:
        if piece.type not in (NORMAL, USER_DEFINED):
            name = piece.piece
            cut = next((at for at, pair in enumerate(pairwise(name), start=1) if pair not in joined), None)
            if cut is not None:
                yield f"{re.escape(name[:cut])}(?={re.escape(name[cut:])})"


def _split(patterns: Sequence[str] | Iterator[str], behaviour: str) -> list[pre_tokenizers.PreTokenizer]:
    pattern = "|".join(patterns)
    return [pre_tokenizers.Split(Regex(pattern), behaviour)] if pattern else []
