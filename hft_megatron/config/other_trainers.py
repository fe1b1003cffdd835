"""Names of transformers, TRL, LLaMA-Factory and ms-swift, each with the option here that has its meaning.

A name that several of them have is listed once, under the first of them. Names that are options here have no row.
"""

from hft_megatron.config import conversions as to
from hft_megatron.config.given import LEAVE
from hft_megatron.config.megatron_rows import Row, Section, accepted, refused

_FROZEN = "give --hft-freeze with patterns of names"
_ROUND_TRIP = "folders in Hugging Face's format are read and written directly; leave it out"
_SAMPLED = "answers are not generated while a model trains; leave it out"
_LENGTH = "give --seq-length VALUE; --long-examples sets what happens to longer ones: error, drop, truncate or split"
_PATTERNS = "give --hft-train with patterns of the names that train, too, such as `model.norm`"
_PLAIN_LORA = "adapters are those of LoRA alone; leave it out"
_NO_EXTRA_WEIGHTS = "beside adapters nothing of the model trains; leave it out"
_UNQUANTIZED = "weights are bf16 or fp32; leave it out"
_NOT_SENT = "nothing is sent to a hub; leave it out; --save-hf FOLDER exports the model"
_ONE_READER = "one thread of every rank makes the next batch; leave it out"
_KERNELS = "--transformer-impl chooses the kernels; leave it out"
_ADAMW = "the optimizer is AdamW with fp32 moments; leave it out"
_COMPILED = "nothing is compiled by torch; leave it out"
_DISTRIBUTED = "data parallelism is megatron-core's; leave it out"
_SHARDED = (
    "data parallelism shards the optimizer's state alone, as ZeRO stage 1 does; leave it out, and split the weights by "
    "--tensor-model-parallel-size and --pipeline-model-parallel-size"
)
_OWN_LOSS = "no such loss is built; --dpo-loss has sigmoid, ipo and hinge"
_PRECOMPUTED = "--dpo-reference precompute is the default; leave it out"
_RECOMPUTED = "give --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
_WHOLE_LAYERS = "--recompute-granularity, --recompute-method and --recompute-num-layers set all of it; leave it out"
_ONE_SPLIT = "a sequence is split over ranks by --sequence-parallel alone"
_SHUFFLED = "examples are shuffled in every epoch; leave it out"
_COMMAND = "the command's name sets it; leave it out"
_LOG = "the log and metrics.jsonl in the --save folder have it; leave it out"
_CACHE = "what was tokenized is kept in --data-cache-path; leave it out"
_PACKED = "give --packing; batch sizes then count packs"
_UNPADDED = f"padding costs time, not quality; leave it out, or {_PACKED}"
_METRIC = "give --save-hf-best METRIC, which names the best export"
_FILES_KEPT_BACK = "give --valid-data-path with files that are kept back from training"
_DEVICES = "GPUs are used where torch finds any; an empty CUDA_VISIBLE_DEVICES hides them"
_NO_FP16 = "16-bit training is in bf16; leave it out"
_ALWAYS_LOGS = "a run always logs; give a large --log-interval"
_NEVER_SAVED = "leave out both it and --save-interval; with --save the last iteration is saved"
_NEVER_EVALUATED = "leave out both it and --eval-interval"
_ALL_TOKENS = "give --loss-on all"
_ANSWERS = "leave it out; --loss-on assistant is the default"


def _switch(flag: str, on: str, off: str = LEAVE) -> Row:
    """A name whose value is true or false, with the answer to each."""
    return refused(flag, on, to.switch(on, off))


TRANSFORMERS = Section(
    title="Names of transformers' TrainingArguments",
    rows=(
        refused("output-dir=", "give --save VALUE for checkpoints, and --save-hf FOLDER for the model at the end"),
        refused("overwrite-output-dir=", "checkpoints of another run are never written over; leave it out"),
        _switch("do-train=", _COMMAND, "give --train-iters 0, which validates and trains nothing"),
        _switch("do-eval=", "give --valid-data-path and --eval-interval"),
        refused("do-predict=", _SAMPLED),
        refused("per-device-train-batch-size=", "give --micro-batch-size VALUE"),
        refused("per-device-eval-batch-size=", "validation has the run's --micro-batch-size; leave it out"),
        _switch("auto-find-batch-size=", "`hft-megatron plan --memory 80GB` says what fits; give --micro-batch-size"),
        refused(
            "gradient-accumulation-steps=",
            "give --global-batch-size, --micro-batch-size x VALUE x the data-parallel ranks",
            to.global_batch,
        ),
        refused("eval-accumulation-steps=", "validation adds up its losses as it goes; leave it out"),
        refused("num-train-epochs=", "give --train-epochs VALUE", to.epochs),
        refused("max-steps=", "give --train-iters VALUE", to.steps),
        refused("learning-rate=", "give --lr VALUE"),
        refused(
            "lr-scheduler-type=",
            "give --lr-decay-style with constant, linear, cosine, inverse-square-root or WSD",
            to.decay_style,
        ),
        refused("lr-scheduler-kwargs=", "give --min-lr, --lr-decay-iters or --lr-wsd-decay-iters"),
        refused("warmup-ratio=", "give --lr-warmup-fraction VALUE"),
        refused("warmup-steps=", "give --lr-warmup-iters VALUE, or a share below 1 as --lr-warmup-fraction", to.warmup),
        refused("adam-epsilon=", "give --adam-eps VALUE"),
        refused("max-grad-norm=", "give --clip-grad VALUE"),
        refused("optim=", _ADAMW),
        refused("optim-args=", _ADAMW),
        refused("optim-target-modules=*", _ADAMW),
        refused("adafactor=", _ADAMW),
        refused("label-smoothing-factor=", "the loss of examples is not smoothed; leave it out"),
        refused("average-tokens-across-devices=", "the loss is that of all ranks' trained tokens; leave it out"),
        refused("neftune-noise-alpha=", "no noise is added to embeddings; leave it out"),
        _switch("gradient-checkpointing=", _RECOMPUTED),
        _switch("activation-checkpointing=", _RECOMPUTED),
        refused("gradient-checkpointing-kwargs=", _WHOLE_LAYERS),
        refused("activation-checkpointing-kwargs=", _WHOLE_LAYERS),
        refused("bf16-full-eval=", "validation has the data type of training; leave it out"),
        refused("fp16-full-eval=", "validation has the data type of training; leave it out"),
        refused("fp16-opt-level=", _NO_FP16),
        refused("half-precision-backend=", _NO_FP16),
        refused("tf32=", "torch decides how fp32 weights are multiplied; leave it out"),
        refused("torch-compile=", _COMPILED),
        refused("torch-compile-backend=", _COMPILED),
        refused("torch-compile-mode=", _COMPILED),
        refused("use-liger-kernel=", _KERNELS),
        refused("liger-kernel-config=", _KERNELS),
        refused("torch-empty-cache-steps=", "give --empty-unused-memory-level 1 or 2"),
        refused("logging-dir=", "give --tensorboard-dir VALUE"),
        refused("logging-strategy=", "give --log-interval, in iterations", to.strategy("--log-interval", _ALWAYS_LOGS)),
        refused("logging-steps=", "give --log-interval VALUE", to.interval("--log-interval")),
        refused("logging-first-step=", "--log-interval 1, the default, logs every iteration; leave it out"),
        refused("logging-nan-inf-filter=", "the log has every loss as it is; leave it out"),
        refused("log-level=", "the log has one level; leave it out"),
        refused("log-level-replica=", "the log has one level; leave it out"),
        refused("log-on-each-node=", "rank 0 writes the log; leave it out"),
        refused("disable-tqdm=", "the bar is on terminals alone; leave it out"),
        refused("include-num-input-tokens-seen=", _LOG),
        refused("include-tokens-per-second=", _LOG),
        refused("report-to=*", "give --tensorboard-dir FOLDER or --wandb-project NAME", to.trackers),
        refused("run-name=", "give --wandb-exp-name VALUE"),
        refused(
            "eval-strategy=", "give --eval-interval, in iterations", to.strategy("--eval-interval", _NEVER_EVALUATED)
        ),
        refused(
            "evaluation-strategy=",
            "give --eval-interval, in iterations",
            to.strategy("--eval-interval", _NEVER_EVALUATED),
        ),
        refused("eval-steps=", "give --eval-interval VALUE", to.interval("--eval-interval")),
        refused("eval-delay=", "validation begins with the first --eval-interval; leave it out"),
        refused("prediction-loss-only=", "validation measures the loss; leave it out"),
        refused("save-strategy=", "give --save-interval, in iterations", to.strategy("--save-interval", _NEVER_SAVED)),
        refused("save-steps=", "give --save-interval VALUE", to.interval("--save-interval")),
        refused("save-total-limit=", "give --keep-last VALUE"),
        _switch(
            "save-safetensors=",
            "exports are safetensors: give --save-hf FOLDER",
            "exports are safetensors; leave it out",
        ),
        _switch("save-only-model=", "a checkpoint can always be resumed from; --save-hf exports the weights alone"),
        refused("save-on-each-node=", "all ranks write one checkpoint into --save; leave it out"),
        _switch("load-best-model-at-end=", _METRIC),
        refused("metric-for-best-model=", "give --save-hf-best with a metric of the validation, such as 'lm loss'"),
        refused("greater-is-better=", "--save-hf-best knows it of its metrics; leave it out"),
        refused("resume-from-checkpoint=", "give --load with the --save folder of a run"),
        refused("ignore-data-skip=", "a resumed run takes the samples that come next; leave it out"),
        _switch("full-determinism=", "give --deterministic-mode"),
        refused("data-seed=", "give --seed, which is that of the data, too"),
        _switch("use-cpu=", _DEVICES),
        _switch("no-cuda=", _DEVICES),
        accepted("dataloader-num-workers=", "one thread of every rank makes the next batch; the samples are the same"),
        refused("dataloader-drop-last=", "the last batch of an epoch is filled up; leave it out"),
        refused("dataloader-pin-memory=", _ONE_READER),
        refused("dataloader-persistent-workers=", _ONE_READER),
        refused("dataloader-prefetch-factor=", _ONE_READER),
        _switch("remove-unused-columns=", "give --ignore-keys with the keys that nothing reads"),
        _switch("group-by-length=", _UNPADDED),
        refused("length-column-name=", "lengths are counted; leave it out"),
        refused("ddp-backend=", "give --distributed-backend nccl or gloo"),
        refused("ddp-timeout=", "give --distributed-timeout-minutes, in minutes", to.timeout),
        refused("ddp-find-unused-parameters=", _DISTRIBUTED),
        refused("ddp-bucket-cap-mb=", "give the parameters of one bucket as --ddp-bucket-size"),
        refused("ddp-broadcast-buffers=", _DISTRIBUTED),
        refused("fsdp=*", _SHARDED),
        refused("fsdp-config=", _SHARDED),
        refused("deepspeed=", _SHARDED),
        refused("accelerator-config=", _DISTRIBUTED),
        refused("parallelism-config=", "give --tensor-model-parallel-size and --pipeline-model-parallel-size"),
        refused("push-to-hub=", _NOT_SENT),
        refused("hub-model-id=", _NOT_SENT),
        refused("hub-strategy=", _NOT_SENT),
        refused("hub-token=", _NOT_SENT),
        refused("hub-private-repo=", _NOT_SENT),
    ),
)

TRL = Section(
    title="Names of TRL's SFTConfig, DPOConfig and ModelConfig",
    rows=(
        refused("model-name-or-path=", "give --load-hf with the folder of the model", to.model),
        refused("model-revision=", "--load-hf is a folder, of one revision; leave it out"),
        refused("dtype=", "give --bf16 or --no-bf16", to.data_type),
        refused("attn-implementation=", "give --transformer-impl local or transformer_engine"),
        _switch("use-peft=", "give --lora-rank with the rank"),
        refused("lora-r=", "give --lora-rank VALUE"),
        refused("lora-target-modules=*", "give --lora-targets with commas between the names", to.lora_targets),
        refused("lora-modules-to-save=*", _NO_EXTRA_WEIGHTS),
        refused("lora-task-type=", "adapters are those of a language model; leave it out"),
        refused("use-rslora=", _PLAIN_LORA),
        refused("use-dora=", _PLAIN_LORA),
        refused("load-in-8bit=", _UNQUANTIZED),
        refused("load-in-4bit=", _UNQUANTIZED),
        refused("bnb-4bit-quant-type=", _UNQUANTIZED),
        refused("use-bnb-nested-quant=", _UNQUANTIZED),
        refused("dataset-name=", "give --train-data-path with the files of the data", to.files("--train-data-path")),
        refused("dataset-config=", "give --train-data-path with the files of the data"),
        refused("dataset-train-split=", "give --train-data-path with the files of the split"),
        refused("dataset-test-split=", "give --valid-data-path with the files of the split"),
        refused("dataset-text-field=", "give --data-keys VALUE=text"),
        refused("dataset-num-proc=", "`hft-megatron preprocess` tokenizes with many processes; leave it out"),
        refused("chat-template-path=", "give --chat-template with a jinja file"),
        refused("eos-token=", "the tokenizer and the chat template set it; leave it out"),
        refused("max-length=", _LENGTH),
        refused("max-seq-length=", _LENGTH),
        refused("max-prompt-length=", "give --seq-length for a prompt and an answer together"),
        refused("truncation-mode=", "give --long-examples truncate, which cuts off the end"),
        refused("shuffle-dataset=", _SHUFFLED),
        refused("packing-strategy=", "give --packing-algorithm; a pack never cuts an example, --long-examples does"),
        refused("eval-packing=", "validation is not packed; leave it out"),
        _switch("padding-free=", _UNPADDED),
        refused("pad-to-multiple-of=", "batches are padded as the layout needs it; leave it out"),
        _switch("completion-only-loss=", _ANSWERS, _ALL_TOKENS),
        _switch("assistant-only-loss=", _ANSWERS, _ALL_TOKENS),
        _switch("activation-offloading=", "activations stay on the device; --recompute-granularity keeps fewer"),
        refused("loss-type=*", "give --dpo-loss sigmoid, ipo or hinge, or the --objective of examples", to.loss),
        refused("loss-weights=*", _OWN_LOSS),
        refused("beta=", "give --dpo-beta VALUE"),
        refused("label-smoothing=", "give --dpo-label-smoothing VALUE"),
        refused("rpo-alpha=", "give --dpo-sft-weight VALUE"),
        refused("ld-alpha=", _OWN_LOSS),
        _switch("use-weighting=", _OWN_LOSS),
        refused("f-divergence-type=", _OWN_LOSS),
        refused("f-alpha-divergence-coef=", _OWN_LOSS),
        refused("discopop-tau=", _OWN_LOSS),
        refused("reference-free=", "every --dpo-loss has a reference; leave it out"),
        _switch("precompute-ref-log-probs=", _PRECOMPUTED, "give --dpo-reference shared or model"),
        refused("precompute-ref-batch-size=", "--micro-batch-size is that of the reference, too; leave it out"),
        refused("sync-ref-model=", "the reference stays as it is; leave it out"),
        refused("ref-model-mixup-alpha=", "the reference stays as it is; leave it out"),
        refused("ref-model-sync-steps=", "the reference stays as it is; leave it out"),
        refused("disable-dropout=", "the model has no dropout; leave it out"),
        refused("max-completion-length=", _SAMPLED),
    ),
)

LLAMA_FACTORY = Section(
    title="Names of LLaMA-Factory",
    rows=(
        refused("stage=", _COMMAND, to.command),
        refused("finetuning-type=", "give --lora-rank, or --hft-ratio for the model's own weights", to.fine_tuning),
        refused("adapter-name-or-path=", "give --lora-adapter VALUE"),
        refused("lora-target=*", "give --lora-targets with commas between the names", to.lora_targets),
        refused("additional-target=*", _NO_EXTRA_WEIGHTS),
        refused("loraplus-lr-ratio=", "all adapters have one rate, --lr; leave it out"),
        refused("pissa-init=", _PLAIN_LORA),
        refused("create-new-adapter=", "--lora-rank alone makes a new adapter; leave it out"),
        refused("freeze-trainable-layers=", to.SOME_LAYERS),
        refused("freeze-trainable-modules=*", to.SOME_LAYERS),
        refused("freeze-extra-modules=*", _PATTERNS),
        refused("pref-beta=", "give --dpo-beta VALUE"),
        refused("pref-loss=", "give --dpo-loss sigmoid, ipo or hinge", to.pair_loss),
        refused("pref-ftx=", "give --dpo-sft-weight VALUE"),
        refused("pref-bco-weight=", _OWN_LOSS),
        refused("simpo-gamma=", _OWN_LOSS),
        refused("kto-chosen-weight=", _OWN_LOSS),
        refused("kto-rejected-weight=", _OWN_LOSS),
        refused("ref-model=", "give --dpo-reference-model VALUE, a Hugging Face folder"),
        _switch("use-dft-loss=", "give --objective dft"),
        _switch("use-asft-loss=", "give --objective asft"),
        refused("asft-alpha=", "give --kl-to-base VALUE"),
        _switch("use-eaft-loss=", "give --objective eaft"),
        refused("eaft-alpha=", "the exponent of --objective eaft is 1, and no other is built; leave it out"),
        refused("template=", "give --chat-template VALUE", to.template),
        refused("dataset=*", "give --train-data-path with the files of the data", to.files("--train-data-path")),
        refused("eval-dataset=*", "give --valid-data-path with the files of the data", to.files("--valid-data-path")),
        refused("dataset-dir=", "the paths of --train-data-path name it; leave it out"),
        refused("cutoff-len=", "give --seq-length VALUE, and --long-examples truncate to cut longer ones"),
        _switch("train-on-prompt=", _ALL_TOKENS),
        _switch("mask-history=", "give --loss-on last"),
        _switch("neat-packing=", _PACKED),
        refused("mix-strategy=", "give a weight before every path of --train-data-path"),
        refused("interleave-probs=*", "give a weight before every path of --train-data-path"),
        refused("buffer-size=", _SHUFFLED),
        refused("disable-shuffling=", _SHUFFLED),
        refused("overwrite-cache=", _CACHE),
        refused("tokenized-path=", "give --data-cache-path VALUE, or data of `hft-megatron preprocess`"),
        refused("preprocessing-num-workers=", "`hft-megatron preprocess` tokenizes with many processes; leave it out"),
        refused("preprocessing-batch-size=", _CACHE),
        refused("max-samples=", "write the first samples to a file of their own for --train-data-path"),
        refused("val-size=", _FILES_KEPT_BACK, to.unless_zero(_FILES_KEPT_BACK)),
        refused("eval-on-each-dataset=", "every source of --valid-data-path is measured anyway; leave it out"),
        refused("ignore-pad-token-for-loss=", "padding never trains; leave it out"),
        refused("use-fast-tokenizer=", "a folder's fast tokenizer is used; leave it out"),
        refused("resize-vocab=", "the vocabulary is the model's; leave it out"),
        refused("flash-attn=", "attention never makes a matrix of scores; leave it out"),
        refused("enable-liger-kernel=", _KERNELS),
        refused("use-unsloth=", _KERNELS),
        _switch("disable-gradient-checkpointing=", "nothing is recomputed by default; leave it out", _RECOMPUTED),
        _switch("pure-bf16=", "bf16 weights have fp32 masters; give --bf16"),
        refused("quantization-bit=", _UNQUANTIZED),
        refused("quantization-method=", _UNQUANTIZED),
        refused("use-galore=", _ADAMW),
        refused("use-apollo=", _ADAMW),
        _switch("use-badam=", "give --hft-selection hift, which trains one group of layers after the other"),
        refused("badam-switch-interval=", "give --hft-round-interval VALUE"),
        refused("plot-loss=", _LOG),
        _switch("use-swanlab=", "give --tensorboard-dir FOLDER or --wandb-project NAME"),
        refused("predict-with-generate=", _SAMPLED),
        refused("export-dir=", "give --save-hf VALUE"),
    ),
)

MS_SWIFT = Section(
    title="Names of ms-swift",
    rows=(
        refused("model=", "give --load-hf with the folder of the model", to.model),
        refused("mcore-model=", "give --load with the --save folder of a run"),
        refused("model-type=", "config.json of the --load-hf folder sets it; leave it out"),
        refused("torch-dtype=", "give --bf16 or --no-bf16", to.data_type),
        refused("val-dataset=*", "give --valid-data-path with the files of the data", to.files("--valid-data-path")),
        refused("split-dataset-ratio=", _FILES_KEPT_BACK, to.unless_zero(_FILES_KEPT_BACK)),
        refused("streaming=", "files are read as they are needed; leave it out"),
        refused("load-from-cache-file=", _CACHE),
        refused("dataset-shuffle=", _SHUFFLED),
        refused("train-dataloader-shuffle=", _SHUFFLED),
        refused("truncation-strategy=", "give --long-examples drop, truncate or split", to.truncation),
        _switch("enable-dft-loss=", "give --objective dft"),
        refused("system=", "a system message is the first of a record's messages; leave it out"),
        refused("model-author=*", "write the name into the data; leave it out"),
        refused("model-name=*", "write the name into the data; leave it out"),
        refused("max-epochs=", "give --train-epochs VALUE", to.epochs),
        refused("tensor-parallel-size=", "give --tensor-model-parallel-size VALUE"),
        refused("pipeline-parallel-size=", "give --pipeline-model-parallel-size VALUE"),
        refused(
            "virtual-pipeline-model-parallel-size=",
            "give --num-layers-per-virtual-pipeline-stage, in layers of one chunk",
        ),
        refused("sequence-parallel-size=", _ONE_SPLIT, to.choice({"1": LEAVE}, _ONE_SPLIT)),
        refused("attn-impl=", "give --transformer-impl local or transformer_engine"),
        refused("freeze-parameters=*", _FROZEN),
        refused("freeze-parameters-ratio=", _FROZEN, to.unless_zero(_FROZEN)),
        refused("trainable-parameters=*", "give --hft-train with patterns of names"),
        refused("rlhf-type=", _COMMAND, to.command),
        refused("tuner-type=", "give --lora-rank, or --hft-ratio for the model's own weights", to.fine_tuning),
        refused("train-type=", "give --lora-rank, or --hft-ratio for the model's own weights", to.fine_tuning),
        refused("target-modules=*", "give --lora-targets with commas between the names", to.lora_targets),
        refused("modules-to-save=*", _NO_EXTRA_WEIGHTS),
        refused("adapters=*", "give --lora-adapter VALUE"),
        refused("merge-lora=", "--save-hf exports the merged model and --save-lora the adapter; leave it out"),
        refused("to-hf=", _ROUND_TRIP),
        refused("to-mcore=", _ROUND_TRIP),
        _switch("test-convert-precision=", "`hft-megatron convert --check` compares logits"),
        refused("use-vllm=", _SAMPLED),
        refused("num-generations=", _SAMPLED),
        refused("reward-funcs=*", _SAMPLED),
    ),
)
"""Names in its scripts beside those of Megatron-LM."""

OTHER_TRAINERS = (TRANSFORMERS, TRL, LLAMA_FACTORY, MS_SWIFT)
"""All sections, in this order."""
