"""A SentencePiece model file with the tokens that a folder's JSON files add to it, or make special."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken

from hft_megatron.data.tiktoken_conversion import is_tiktoken
from hft_megatron.data.tokenizer import SPACE_MARK, SpecialToken
from hft_megatron.data.tokenizer_files import TokenizerFiles
from hft_megatron.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""SentencePiece's ``ModelProto.SentencePiece.Type``."""
BPE = 2
"""SentencePiece's ``TrainerSpec.ModelType``."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Pieces and the added tokens after them."""

    proto: Any
    """The ``ModelProto``; pieces that the files call special are control pieces of it, so that no text has them."""
    added: Mapping[int, AddedToken]
    """Tokens after the pieces, without a gap."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The text of every id."""
        return (*(piece.piece for piece in self.proto.pieces), *(token.content for token in self.added.values()))

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def id_of(self, name: str) -> int | None:
        """The id of a piece or an added token; None where there is none."""
        return self._ids.get(name)

    @cached_property
    def named(self) -> dict[str, str]:
        """The model's own begin, end, unknown and pad pieces, by the keys of a tokenizer_config.json."""
        spec = self.proto.trainer_spec
        own = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
        return {key: self.names[number] for key, number in own.items() if number >= 0} | {
            "unk_token": self.names[self.unknown_id]
        }

    @cached_property
    def unknown_id(self) -> int:
        """The id of the unknown piece, which every model has."""
        return next(number for number, piece in enumerate(self.proto.pieces) if piece.type == UNKNOWN)

    @cached_property
    def special_tokens(self) -> tuple[SpecialToken, ...]:
        """Control pieces, the unknown one, and the special ones of the added tokens, by id."""
        pieces = [
            SpecialToken(content=piece.piece, id=number)
            for number, piece in enumerate(self.proto.pieces)
            if piece.type in (CONTROL, UNKNOWN)
        ]
        added = [
            SpecialToken(content=token.content, id=number, strips_left=token.lstrip, strips_right=token.rstrip)
            for number, token in self.added.items()
            if token.special
        ]
        return (*pieces, *added)

    @cached_property
    def found_in_text(self) -> dict[int, AddedToken]:
        """The added tokens that are not special, by id: a text that holds their names has them."""
        return {number: token for number, token in self.added.items() if not token.special}

    @cached_property
    def defined(self) -> tuple[str, ...]:
        """The user-defined pieces, which the library finds in a text before all others."""
        return tuple(piece.piece for piece in self.proto.pieces if piece.type == USER_DEFINED)

    @property
    def removes_spaces(self) -> bool:
        """True if spaces at the ends of a text are removed, and several in a row become one."""
        return bool(self.proto.normalizer_spec.remove_extra_whitespaces)

    def processor(self, **normalizer: bool | bytes) -> SentencePieceProcessor:
        """The library's encoder, with some of the normalizer's settings changed."""
        return SentencePieceProcessor(model_proto=_changed(self.proto, **normalizer).SerializeToString())


def read_vocabulary(file: Path, files: TokenizerFiles) -> Vocabulary:
    """Read a ``.model`` file, and the facts about its tokens in ``files``.

    Raises UserError where it isn't a SentencePiece model or cannot be exported, and for an added token whose id is not
    the next free one.
    """
    proto = _read_proto(file)
    _check_convertible(file, proto)
    size = len(proto.pieces)
    listed = {number: token for number, token in files.added.items() if number < size}
    special = {token.content for token in files.names.values() if token is not None} | set(files.extra)
    for number, token in listed.items():
        if token.special and proto.pieces[number].type != UNKNOWN:
            proto.pieces[number].piece = token.content
            proto.pieces[number].type = CONTROL
    for piece in proto.pieces:
        if piece.piece in special and piece.type in (NORMAL, USER_DEFINED):
            piece.type = CONTROL
    _check_defined(file, proto)
    added = _added_tokens(proto, files, special)
    return Vocabulary(proto=proto, added=added)


def _added_tokens(proto: Any, files: TokenizerFiles, special: set[str]) -> dict[int, AddedToken]:
    size = len(proto.pieces)
    pieces = {piece.piece for piece in proto.pieces}
    added: dict[int, AddedToken] = {}
    for number, token in sorted(files.added.items()):
        if number < size or token.content in pieces:
            continue
        if number != size + len(added):
            raise UserError(
                f"{files.folder} gives the added token {token.content!r} the id {number}, but the next free one is "
                f"{size + len(added)}; list the tokens between them, too."
            )
        token.special = token.special or token.content in special
        added[number] = token
    known = pieces | {token.content for token in added.values()}
    for name in files.extra:
        if name not in known:
            added[size + len(added)] = AddedToken(name, special=True, normalized=False)
    return added


def _read_proto(file: Path) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    content = file.read_bytes()
    if not content:  # an empty file is a valid, empty message
        raise UserError(f"--tokenizer-model {file} is empty; name a tokenizer.model.")
    try:
        proto = model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
        SentencePieceProcessor(model_proto=content)
    except (DecodeError, RuntimeError) as error:
        if is_tiktoken(content):
            raise UserError(
                f"--tokenizer-model {file} is a tiktoken file, as Llama 3 has it, not a SentencePiece model; leave out "
                f"--tokenizer-type."
            ) from error
        raise UserError(f"--tokenizer-model {file} is not a SentencePiece model; name a tokenizer.model.") from error
    return proto


def _check_convertible(file: Path, proto: Any) -> None:
    """Refuse at the start what the export at the end of the run couldn't reproduce."""
    kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type)
    if kind not in ("BPE", "UNIGRAM"):
        raise UserError(f"--tokenizer-model {file} is of type {kind}; only BPE and UNIGRAM models can be exported.")
    if proto.trainer_spec.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
        raise UserError(
            f"--tokenizer-model {file} marks spaces in an unusual way that cannot be exported; train it with "
            f"treat_whitespace_as_suffix false and escape_whitespaces true."
        )


def _check_defined(file: Path, proto: Any) -> None:
    """Refuse user-defined pieces that only the library preserves: the export would change the text before it looks."""
    bare = _changed(proto, add_dummy_prefix=False)
    defined = [piece for piece in bare.pieces if piece.type == USER_DEFINED]
    for piece in defined:
        piece.type = NORMAL
    normalizer = SentencePieceProcessor(model_proto=bare.SerializeToString())
    for piece in defined:
        if normalizer.normalize(piece.piece) != piece.piece.replace(" ", SPACE_MARK):
            raise UserError(
                f"--tokenizer-model {file} has the user-defined piece {piece.piece!r}, which its own normalization "
                f"would change after an export; train it without that piece, or with normalization_rule_name "
                f"identity and remove_extra_whitespaces false."
            )


def _changed(proto: Any, **normalizer: bool | bytes) -> Any:
    """A copy with some of the normalizer's settings changed."""
    copied = type(proto).FromString(proto.SerializeToString())
    for setting, value in normalizer.items():
        setattr(copied.normalizer_spec, setting, value)
    return copied
