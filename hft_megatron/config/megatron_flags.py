"""The table of Megatron-LM's training flags, by its parser of core_r0.16 and later: which of them are supported.

A name that a command has as an option is that option, and needs no row. ``hft-megatron flags`` prints the table.
"""

from hft_megatron.config.megatron_dense import DENSE
from hft_megatron.config.megatron_others import OTHERS
from hft_megatron.config.megatron_rows import Row, Section, accepted, refused

_ROUND_TRIP = "folders in Hugging Face's format are read and written directly; leave it out"
_SAMPLED = "answers are not generated while a model trains; leave it out"

MS_SWIFT = Section(
    title="Names of ms-swift that are not Megatron-LM's",
    rows=(
        refused("model=", "here --load-hf, with a Hugging Face folder on disk"),
        refused("mcore-model=", "here --load, with the --save folder of a run"),
        refused("ref-model=", "here --dpo-reference-model, with a Hugging Face folder on disk"),
        refused("model-type=", "config.json of the --load-hf folder says it; leave it out"),
        refused("torch-dtype=", "here --bf16 or --no-bf16"),
        refused("dataset=*", "here --train-data-path, with files"),
        refused("val-dataset=*", "here --valid-data-path, with files"),
        refused("split-dataset-ratio=", "here --valid-data-path, with files that are kept back from training"),
        refused("streaming=", "files are read as they are needed; leave it out"),
        refused("dataset-num-proc=", "`hft-megatron preprocess` tokenizes with many processes; leave it out"),
        refused("load-from-cache-file=", "what was tokenized is kept in --data-cache-path; leave it out"),
        refused("dataset-shuffle=", "examples are shuffled in every epoch; leave it out"),
        refused("train-dataloader-shuffle=", "examples are shuffled in every epoch; leave it out"),
        accepted("dataloader-num-workers=", "one thread of every rank makes the next batch; the samples are the same"),
        refused("group-by-length=", "here --packing"),
        refused("padding-free=", "here --packing"),
        refused("max-length=", "here --seq-length"),
        refused("truncation-strategy=", "here --long-examples error, drop, truncate or split"),
        refused("template=", "here --chat-template"),
        refused("system=", "a system message is the first of a record's messages; leave it out"),
        refused("model-author=*", "write the name into the data; leave it out"),
        refused("model-name=*", "write the name into the data; leave it out"),
        refused("num-train-epochs=", "here --train-epochs"),
        refused("max-epochs=", "here --train-epochs"),
        refused("max-steps=", "here --train-iters"),
        refused("per-device-train-batch-size=", "here --micro-batch-size"),
        refused("per-device-eval-batch-size=", "validation has the run's --micro-batch-size; leave it out"),
        refused("gradient-accumulation-steps=", "here --global-batch-size, over all ranks and steps of accumulation"),
        refused("learning-rate=", "here --lr"),
        refused("warmup-ratio=", "here --lr-warmup-fraction"),
        refused("output-dir=", "here --save"),
        refused("save-steps=", "here --save-interval"),
        refused("save-total-limit=", "here --keep-last"),
        refused("save-safetensors=", "here --save-hf, with a folder for the export"),
        refused("save-only-model=", "a checkpoint can always be resumed from; --save-hf exports the weights alone"),
        refused("eval-steps=", "here --eval-interval"),
        refused("logging-steps=", "here --log-interval"),
        refused("report-to=*", "here --tensorboard-dir or --wandb-project"),
        refused("ddp-timeout=", "here --distributed-timeout-minutes, in minutes"),
        refused("ddp-backend=", "here --distributed-backend"),
        refused("virtual-pipeline-model-parallel-size=", "here --num-layers-per-virtual-pipeline-stage"),
        refused("attn-impl=", "here --transformer-impl"),
        refused("freeze-parameters=*", "here --hft-freeze, with patterns"),
        refused("trainable-parameters=*", "here --hft-train, with patterns"),
        refused("rlhf-type=", "here a command of its own: `hft-megatron dpo`"),
        refused("beta=", "here --dpo-beta"),
        refused("loss-type=", "here --dpo-loss sigmoid, ipo or hinge"),
        refused("rpo-alpha=", "here --dpo-sft-weight"),
        refused("label-smoothing=", "here --dpo-label-smoothing"),
        refused("tuner-type=", "here --lora-rank, or --hft-ratio without adapters"),
        refused("train-type=", "here --lora-rank, or --hft-ratio without adapters"),
        refused("target-modules=*", "here --lora-targets, with commas between the names"),
        refused("modules-to-save=*", "beside adapters nothing of the model trains; leave it out"),
        refused("adapters=*", "here --lora-adapter"),
        refused("merge-lora=", "here --save-hf exports the merged model and --save-lora the adapter"),
        refused("to-hf=", _ROUND_TRIP),
        refused("to-mcore=", _ROUND_TRIP),
        refused("test-convert-precision=", "`hft-megatron convert --check` compares logits"),
        refused("use-vllm=", _SAMPLED),
        refused("num-generations=", _SAMPLED),
        refused("max-completion-length=", _SAMPLED),
        refused("reward-funcs=*", _SAMPLED),
    ),
)
"""Flags in ms-swift's scripts beside Megatron-LM's."""

SECTIONS: tuple[Section, ...] = (*DENSE, *OTHERS, MS_SWIFT)

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
