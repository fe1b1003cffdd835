"""The table of Megatron-LM's training flags, by its parser of core_r0.16 and later, and of other trainers' names: which
of them are supported.

A name that a command has as an option is that option, and needs no row. ``hft-megatron flags`` prints the table.
"""

from hft_megatron.config.megatron_dense import DENSE
from hft_megatron.config.megatron_others import OTHERS
from hft_megatron.config.megatron_rows import Row, Section, accepted, refused
from hft_megatron.config.other_trainers import OTHER_TRAINERS

SECTIONS: tuple[Section, ...] = (*DENSE, *OTHERS, *OTHER_TRAINERS)

ROWS = {row.name: row for section in SECTIONS for row in section.rows}
"""All rows, by name."""

_RECORDS = "it is an option of `hft-megatron pretrain`; give the training data of this command as --train-data-path"

OF_OTHER_COMMANDS = {
    row.name: row
    for row in (
        refused("data-path=*", _RECORDS),
        refused("mock-data", _RECORDS),
        refused("split=", "it is an option of `hft-megatron pretrain`; give validation files as --valid-data-path"),
        accepted("reset-attention-mask", "examples of a pack see only themselves"),
        accepted("reset-position-ids", "examples of a pack have positions of their own"),
        refused(
            "eod-mask-loss",
            "it is an option of `hft-megatron pretrain`; --loss-on and --train-on-eos choose the trained tokens here",
        ),
        refused(
            "chat-template=",
            "it is an option of `hft-megatron sft` and `dpo`; a corpus has no conversations, leave it out",
        ),
    )
}
"""Rows of options that only some of the commands have, for the others."""

VALUES_NOT_HAD = {
    ("inference_optimized",): refused("transformer-impl=", "nothing is generated while a model trains"),
    (
        *("BertWordPieceLowerCase", "BertWordPieceCase", "GPT2BPETokenizer", "GPTSentencePieceTokenizer"),
        *("Llama2Tokenizer", "TikTokenizer", "MultimodalTokenizer", "NullTokenizer", "NullMultimodalTokenizer"),
        "SFTTokenizer",
    ): refused(
        "tokenizer-type=",
        "tokenizers are Hugging Face folders or SentencePiece models; give HuggingFaceTokenizer or "
        "SentencePieceTokenizer, and its files as --tokenizer-model",
    ),
}
"""Rows of options here, by the values of Megatron-LM's option that this one does not have."""

MEGATRON_DEFAULTS = {
    "bf16": "off",
    "distributed-backend": "nccl",
    "eval-interval": "1000",
    "eval-iters": "100",
    "log-interval": "100",
    "lr-decay-style": "linear",
    "make-vocab-size-divisible-by": "128",
    "num-query-groups": "1",
    "transformer-impl": "transformer_engine",
}
"""Defaults of Megatron-LM's options of the same name where they differ from those here."""


def refused_value(name: str, words: tuple[str, ...]) -> Row | None:
    """The row that refuses an option's value; None where no row does."""
    return next((row for values, row in VALUES_NOT_HAD.items() if row.name == name and set(words) & set(values)), None)
