"""Turns a SentencePiece model into a Hugging Face ``tokenizer.json`` with the same ids.

BPE in SentencePiece has scores and no merge list: it always joins the pair whose joined piece scores best. The list
that makes Hugging Face's BPE do the same holds every way to split a piece into two pieces, best score first.
"""

from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from hft_megatron.data.sentencepiece_cuts import cuts
from hft_megatron.data.sentencepiece_model import BPE, CONTROL, UNKNOWN, USER_DEFINED, Vocabulary
from hft_megatron.data.tokenizer import SPACE_MARK

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
            # The library prefers them to whatever else could be in their place, with just this score.
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
    """SentencePiece's own order of steps.

    The dummy prefix is a Prepend and not a Metaspace pre-tokenizer: Metaspace leaves it out before a text that starts
    with a space. The price is a mark behind every special token too, so our own encoding does the same there.
    """
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # Not Strip, which takes line ends too. Two steps, as a text that continues another keeps a space at its start.
        steps.append(normalizers.Replace(Regex(SPACES_AT_START), ""))
        steps.append(normalizers.Replace(Regex(r" +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE_MARK))
    steps.append(normalizers.Replace(" ", SPACE_MARK))
    return normalizers.Sequence(steps)
