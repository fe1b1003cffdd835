"""Turns a SentencePiece model into a Hugging Face ``tokenizer.json`` with the same ids.

The tokenizers library recognises control pieces and byte names in a text, which SentencePiece never does.

BPE in SentencePiece has scores and no merge list: it always joins the pair whose joined piece scores best. The list
that makes Hugging Face's BPE do the same holds every way to split a piece into two pieces, best score first.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from hft_megatron.data.sentencepiece_model import BPE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary
from hft_megatron.data.tokenizer import SPACE_MARK


def cuts(vocabulary: Vocabulary) -> list[pre_tokenizers.PreTokenizer]:
    """Steps for normalized text, none where the model alone finds the same pieces.

    The steps of BPE need a model that looks a stretch up as a whole before it merges (``ignore_merges``).
    """
    if vocabulary.proto.trainer_spec.model_type != BPE:
        return _split(_names_in_two(vocabulary), "merged_with_previous")
    if not vocabulary.defined:
        return []
    # As added tokens they would restart the text after them, with a mark that SentencePiece doesn't put there.
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
    """Patterns of the first part of every name that no text has as a token, where no piece can cross the cut."""
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


SPACES_AT_START = r"\A +"


def to_rust_tokenizer(vocabulary: Vocabulary, *, bos_id: int | None) -> RustTokenizer:
    """The tokenizer of a SentencePiece model; encoding with special tokens puts the beginning token first."""
    proto = vocabulary.proto
    rust = RustTokenizer(_model(vocabulary))
    rust.normalizer = _normalizer(proto.normalizer_spec)
    if steps_before := cuts(vocabulary):
        rust.pre_tokenizer = pre_tokenizers.Sequence(steps_before)
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    rust.decoder = decoders.Sequence(steps)
    special = [piece.piece for piece in proto.pieces if piece.type in (CONTROL, UNKNOWN)]
    rust.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    for token in vocabulary.added.values():  # by id, which is the order in which the library numbers them
        rust.add_tokens(
            [
                AddedToken(
                    token.content,
                    special=token.special,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=False,
                )
            ]
        )
    if bos_id is not None:
        bos = vocabulary.names[bos_id]
        rust.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    return rust


def _model(vocabulary: Vocabulary) -> models.Model:
    proto = vocabulary.proto
    byte_fallback = bool(proto.trainer_spec.byte_fallback)
    unknown = next(index for index, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
    if proto.trainer_spec.model_type != BPE:
        scored = [
            # The library prefers them to any other piece in their place, with just this score.
            (piece.piece, -0.1 if piece.type == USER_DEFINED else piece.score)
            for piece in proto.pieces
        ]
        return models.Unigram(scored, unk_id=unknown, byte_fallback=byte_fallback)
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    return models.BPE(
        vocab=vocab,
        merges=_merges(proto),
        unk_token=proto.pieces[unknown].piece,
        fuse_unk=True,
        byte_fallback=byte_fallback,
        ignore_merges=bool(vocabulary.defined),
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every split of every normal piece into two others, ordered by the joined piece's score, then by its id."""
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for index, piece in enumerate(proto.pieces):
        if piece.type in (CONTROL, UNKNOWN, USER_DEFINED):
            continue
        splits = [(piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece))]
        pairs = sorted((ids[left], ids[right], left, right) for left, right in splits if left in ids and right in ids)
        ranked.extend((-piece.score, index, order, left, right) for order, (_, _, left, right) in enumerate(pairs))
    return [(left, right) for _, _, _, left, right in sorted(ranked)]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """The normalizer with SentencePiece's own order of steps.

    The dummy prefix is a Prepend and not a Metaspace pre-tokenizer: Metaspace leaves it out before a text that starts
    with a space. The price is a mark after every special token too, so our own encoding does the same there.
    """
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # Not Strip, which removes line ends too. Two steps: a text that continues another keeps a space at its start.
        steps.append(normalizers.Replace(Regex(SPACES_AT_START), ""))
        steps.append(normalizers.Replace(Regex(r" +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE_MARK))
    steps.append(normalizers.Replace(" ", SPACE_MARK))
    return normalizers.Sequence(steps)
