"""A tokenizer from a SentencePiece ``tokenizer.model``, the format LLaMA 1 and 2 and our demo come with.

The sentencepiece library makes the ids; the export is a conversion that gives the same ids in transformers.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from hft_megatron.data import templates
from hft_megatron.data.sentencepiece_conversion import to_rust_tokenizer
from hft_megatron.data.special_tokens import SpecialToken
from hft_megatron.data.tokenizer import Tokenizer, TokenizerFacts, choose_pad_id
from hft_megatron.errors import UserError


class SentencePieceTokenizer(Tokenizer):
    """See Tokenizer. Control pieces such as ``</s>`` never come from a text: the library itself sees to that."""

    def __init__(self, facts: TokenizerFacts, proto: Any, file: Path) -> None:
        super().__init__(facts)
        self._proto = proto
        self._file = file
        self._processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
        # The library can't switch the dummy prefix per call, so a second processor has it off.
        continuing = type(proto).FromString(proto.SerializeToString())
        continuing.normalizer_spec.add_dummy_prefix = False
        self._continuing = SentencePieceProcessor(model_proto=continuing.SerializeToString())

    @property
    def continues_after_special(self) -> bool:
        return False  # as the exported files do, and as LLaMA's first code did by encoding every turn on its own

    def encode_batch(self, texts: Sequence[str], *, continues: bool) -> list[list[int]]:
        processor = self._continuing if continues else self._processor
        ids: list[list[int]] = processor.encode(list(texts))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([int(token) for token in ids])
        return text

    def export(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._file, directory / "tokenizer.model")
        to_rust_tokenizer(self._proto, bos_id=self.bos_id).save(str(directory / "tokenizer.json"))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.facts.template_variables,
            "add_bos_token": self.bos_id is not None,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "padding_side": "right",
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (directory / "chat_template.jinja").write_text(self.facts.chat_template, encoding="utf-8")


def load_sentencepiece_tokenizer(file: Path, chat_template: str | None) -> SentencePieceTokenizer:
    """Load a ``.model`` file, which has no template of its own: --chat-template, or the project's default.

    Raises UserError when it isn't one, can't be exported or has no end token.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    content = file.read_bytes()
    if not content:  # an empty file is a valid, empty message
        raise UserError(f"--tokenizer-model {file} is empty; name a tokenizer.model.")
    try:
        proto: Any = model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
        processor = SentencePieceProcessor(model_proto=content)
    except (DecodeError, RuntimeError) as error:
        if _is_tiktoken(content):
            raise UserError(
                f"--tokenizer-model {file} is a tiktoken file, which transformers reads from a folder: name the "
                f"folder, with a tokenizer_config.json in it that lists the special tokens, and install tiktoken."
            ) from error
        raise UserError(f"--tokenizer-model {file} is not a SentencePiece model; name a tokenizer.model.") from error
    _check_convertible(file, proto)
    eos_id = processor.eos_id()
    if eos_id < 0:
        raise UserError(f"--tokenizer-model {file} has no end piece, which every example ends with; train one with it.")
    bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
    own_pad_id = processor.pad_id() if processor.pad_id() >= 0 else None
    pad_id = choose_pad_id(own_pad_id, processor.unk_id(), eos_id)
    named = {"bos_token": bos_id, "eos_token": eos_id, "unk_token": processor.unk_id(), "pad_token": pad_id}
    special_tokens = tuple(
        SpecialToken(content=processor.id_to_piece(token), id=token)
        for token in range(processor.get_piece_size())
        if processor.is_control(token) or processor.is_unknown(token)
    )
    facts = TokenizerFacts(
        source=str(file),
        identity=hashlib.sha256(content).hexdigest(),
        vocab_size=processor.get_piece_size(),
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=pad_id,
        special_tokens=special_tokens,
        chat_template=templates.DEFAULT
        if chat_template is None
        else templates.read_template(chat_template, special_tokens),
        template_variables={name: processor.id_to_piece(token) for name, token in named.items() if token is not None},
    )
    return SentencePieceTokenizer(facts, proto, file)


def _is_tiktoken(content: bytes) -> bool:
    """Whether the first line is a token in base64 and its rank, as in Llama 3's own ``tokenizer.model``."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content) is not None


def _check_convertible(file: Path, proto: Any) -> None:
    """Refuse at the start what the export at the end of the run couldn't reproduce."""
    kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type)
    if kind not in ("BPE", "UNIGRAM"):
        raise UserError(f"--tokenizer-model {file} is of type {kind}; only BPE and UNIGRAM models can be exported.")
    if proto.trainer_spec.treat_whitespace_as_suffix or not proto.normalizer_spec.escape_whitespaces:
        raise UserError(
            f"--tokenizer-model {file} marks spaces in an unusual way that can't be exported; train it with "
            f"treat_whitespace_as_suffix false and escape_whitespaces true."
        )
