"""Every option of a run, as frozen dataclasses. Field names are Megatron's flag names with underscores.

Imports neither torch nor megatron, so that a wrong option is reported in milliseconds.
"""

from dataclasses import dataclass, field
from typing import Literal

from hft_megatron.config.names import DataFormat, SelectionName

TransformerImpl = Literal["local", "transformer_engine"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the batch are spread over ranks."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first pipeline stage, where stages are uneven; the stages that no option sizes share the rest."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last pipeline stage, which also has the head and the loss."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of one model chunk under the interleaved pipeline schedule."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence (needs TP > 1)."""
    overlap_grad_reduce: bool = False
    """Reduce-scatter gradients bucket by bucket while the backward pass runs."""
    overlap_param_gather: bool = False
    """All-gather updated parameters while the next forward pass runs (needs --overlap-grad-reduce)."""
    ddp_bucket_size: int | None = None
    """Parameters of one gradient bucket; megatron-core's default when unset."""
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """nccl where CUDA is present, gloo elsewhere, when unset."""
    distributed_timeout_minutes: float = 10.0
    """How long ranks wait for each other, when they meet and in every collective (0.5: half a minute); a host that is
    silent for half of it, at most for two minutes, is named, and ends the run."""
    context_parallel_size: int = 1
    """Not built yet: only 1."""
    expert_model_parallel_size: int = 1
    """Not built yet: only 1."""
    use_megatron_fsdp: bool = False
    """Not built yet: only off."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the model comes from: a Hugging Face folder, or a shape with random weights."""

    load_hf: str | None = None
    """Hugging Face folder (config.json and safetensors) to start from; the shape flags below are then not allowed."""
    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    vocab_size: int | None = None
    """The tokenizer's when unset."""
    max_position_embeddings: int | None = None
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    untie_embeddings_and_output_weights: bool = False
    init_method_std: float = 0.02
    make_vocab_size_divisible_by: int = 1
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how much at a time, in what precision."""

    micro_batch_size: int = 1
    """Sequences of one forward pass on one data-parallel rank; under --packing a sequence is a pack of examples. In
    preference tuning pairs, or packs of them, are counted, here and in --global-batch-size."""
    global_batch_size: int | None = None
    """Sequences of one optimizer step over all ranks; micro-batch size x data-parallel size when unset."""
    skip_nonfinite_steps: int = 0
    """Steps of the run, at most, whose loss or gradients are infinite or undefined and that are left out; the next one
    ends the run. Their samples count as seen; weights, moments and learning rate stay as if the step had not been."""
    train_iters: int | None = None
    """Optimizer steps; 100 when neither this nor --train-epochs is set. 0 trains nothing."""
    train_epochs: int | None = None
    """Passes over the training data, instead of --train-iters. The last batch of an epoch is filled up with the first
    samples of the next, the last one of all too."""
    check_replicas_interval: int | None = None
    """Iterations between comparisons of the weights that several ranks hold, bit for bit: those of data-parallel
    replicas, norms over tensor-parallel ranks, tied embeddings. Ranks that differ end the run and are named."""
    exit_duration_in_mins: float | None = None
    """Save and end (exit code 3, as after a signal) at the first iteration this long after the start."""
    seq_length: int | None = None
    """Longest training sequence in tokens; the model's limit when unset."""
    bf16: bool | None = None
    """bf16 weights with fp32 masters, or fp32 (--no-bf16). Unset: bf16 on CUDA and CPUs with AMX or AVX512-BF16."""
    transformer_impl: TransformerImpl = "local"
    """Whose kernels compute attention, norms and Adam: torch's, whatever else is installed, or those of
    transformer-engine (needs CUDA and bf16), or NVIDIA's Apex for Adam where it alone has one."""
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = None
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Not built yet: only unset."""
    seed: int = 1234
    deterministic_mode: bool = False
    """Only deterministic kernels and a fixed order of reductions: repeated runs are equal bit for bit."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-5
    min_lr: float = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    lr_decay_iters: int | None = None
    """Iterations until the learning rate has come down to --min-lr, where it stays; those of the run when unset, or of
    a round under --hft-lr-schedule round. Given, a run can be made longer without another schedule."""
    lr_warmup_iters: int = 0
    lr_warmup_fraction: float | None = None
    """Warm-up as a fraction of the iterations of the decay, instead of --lr-warmup-iters."""
    weight_decay: float = 0.01
    """Not applied to one-dimensional parameters (norms), as in Megatron."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


LongExamples = Literal["error", "drop", "truncate", "split"]
PackingAlgorithm = Literal["first_fit_decreasing", "first_fit_shuffle"]
"""Under the names that NeMo gives them."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    train_data_path: tuple[str, ...] = ()
    """Files, globs or TRACE task folders (.jsonl, .json, .csv, .tsv, .txt, each also with .gz or .zst, .parquet), or
    the prefix of data from `hft-megatron preprocess`. A number before each is its weight: the share of training samples
    drawn from it, as in Megatron. Without weights every example comes once in an epoch."""
    valid_data_path: tuple[str, ...] = ()
    """Like --train-data-path, without weights; of a TRACE folder, eval.json."""
    data_format: DataFormat | None = None
    """Layout of the records; recognised by the keys of a file's first record when unset."""
    data_keys: str | None = None
    """KEY=NAME,... for records with other names: question=prompt,answer=completion reads `question` as `prompt`."""
    prompt_separator: str = ""
    """Text between a prompt and its completion or answers, where they are texts of their own: \\n is a line end."""
    ignore_keys: str | None = None
    """Keys of records and messages to pass over, separated by commas, such as `chosen,name`: also those that would be
    an error because nothing here reads them. How many records have them is in the log."""
    chat_template: str | None = None
    """plain, tulu, llama2, llama3, chatml, or a jinja file; the tokenizer's own, or tulu where it has none, when
    unset."""
    loss_on: Literal["assistant", "all", "last"] = "assistant"
    """Train the assistant's turns (or the completion), everything, or the last assistant's turn only."""
    train_on_eos: bool = True
    """Train the token that ends each trained turn; without it a model does not learn to stop."""
    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"] | None = None
    """Found from the files when unset."""
    tokenizer_model: str | None = None
    """Hugging Face folder or SentencePiece .model file; the --load-hf folder when unset."""
    data_cache_path: str | None = None
    """Folder in which the first process of a start keeps what it has tokenized, for the others and for later starts;
    hft_megatron/data in $XDG_CACHE_HOME, or in ~/.cache, when unset."""
    long_examples: LongExamples = "error"
    """What to do with an example longer than --seq-length: stop, leave it out, cut off its end, or make several
    examples of it (each begins where the last one ended, and sees nothing of it). All are counted and reported."""
    packing: bool = False
    """Put several training examples into one sequence of --seq-length (pairs into one of twice that). Attention stays
    within an example and positions restart, so the loss is that of the examples on their own. Batch sizes, samples and
    epochs then count these packs. Validation is not packed: its loss is the same."""
    packing_algorithm: PackingAlgorithm = "first_fit_decreasing"
    """Which examples share a pack: each goes into the first pack with room for it, the longest first, or in shuffled
    order."""
    packing_window: int = 4096
    """Examples, of an epoch's shuffled ones, that are packed together; more fill the packs better and take longer."""


PreferenceLoss = Literal["sigmoid", "ipo", "hinge"]
ReferenceKind = Literal["precompute", "shared", "model"]
BadPairs = Literal["error", "skip"]


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """Learning from preference pairs."""

    dpo_loss: PreferenceLoss = "sigmoid"
    """DPO's loss, IPO's, or the hinge of SLiC."""
    dpo_beta: float = 0.1
    """How much the policy is held to the reference model; the tau of IPO."""
    dpo_label_smoothing: float = 0.0
    """Probability that the answers of a pair were confused, from 0 to below 0.5 (conservative DPO; sigmoid only)."""
    dpo_average_log_probs: bool | None = None
    """Divide every answer's log-probability by its number of tokens; for ipo, as its authors do, when unset."""
    dpo_sft_weight: float = 0.0
    """Add this times the mean token loss of the chosen answer (RPO)."""
    dpo_reference: ReferenceKind = "precompute"
    """Where the reference's log-probabilities come from: one pass over the data before training, kept on disk;
    a copy of just the units that train, put in their place for a second forward pass in every step; or a second
    model. All three give the same losses."""
    dpo_reference_model: str | None = None
    """Hugging Face folder of the reference model (not for shared); the weights that the run starts from when unset."""
    dpo_reference_cache: str | None = None
    """Folder for the log-probabilities of precompute; hft_megatron/reference in $XDG_CACHE_HOME, or in ~/.cache, when
    unset."""
    dpo_bad_pairs: BadPairs = "error"
    """Stop at a pair that nothing can be learned of (equal answers, an empty one, a prompt that leaves no room for an
    answer, answers to different prompts), or leave such pairs out and count them."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What is pre-trained on."""

    data_path: tuple[str, ...] = ()
    """Prefixes of .bin and .idx files, as tools/preprocess_data.py of Megatron writes them. A number before each is
    its weight: the share of training samples drawn from it. Several sources without weights are gone through once; a
    single one, or with weights, as often as the iterations ask for."""
    split: str = "969,30,1"
    """Shares of every source's documents, from its beginning, for training, validation and test; the test part is left
    alone."""
    mock_data: bool = False
    """Megatron-core's made-up documents of counting numbers instead of --data-path, to try a run out."""


@dataclass(frozen=True, kw_only=True)
class HFTConfig:
    """Which weight matrices train in a round, and what happens between rounds."""

    hft_ratio: float = 0.5
    """Share of the matrices that trains; 1 is full fine-tuning."""
    hft_level: Literal["category", "layer", "model"] = "category"
    """Draw the share within every category of a layer (the paper's best), as whole layers, or over the whole model."""
    hft_selection: SelectionName = "random"
    """Random draws (the paper), the highest signal-to-noise ratio of singular values (Spectrum; computed once, so only
    complementary rotation changes it), embeddings and head with --hft-ratio of the layers, drawn anew in every round
    (LISA), or one group of layers, --hft-ratio of the model, after the other (HiFT)."""
    hft_counting: Literal["matrices", "parameters"] = "matrices"
    """What --hft-ratio is a share of; they differ under grouped-query attention. By parameters, every layer trains the
    share of each category that is closest to the ratio."""
    hft_pairing: Literal["independent", "complementary"] = "independent"
    """Draw every layer on its own, or give layers 2i and 2i+1 complementary draws, so that every two layers train
    exactly half of their parameters (needs --hft-ratio 0.5; an odd last layer is drawn alone)."""
    hft_rotation: Literal["independent", "complementary", "fixed"] = "independent"
    """Each round drawn anew (the paper), training what the last one rested (needs --hft-ratio 0.5), or like the first.
    Embedding, final norm and head train in every round unless frozen."""
    hft_seed: int | None = None
    """Seed of the draw; --seed when unset."""
    hft_round_interval: str = "stage"
    """When a new round begins: with a new stage (one plan for the whole run), every `epoch`, or every N iterations."""
    hft_first_round: int | None = None
    """Number of the first round, 0 unless another run's rounds came before: with 1, --hft-rotation complementary
    trains what a run with the same options rested in its first."""
    hft_moments: Literal["reset", "carry"] = "reset"
    """At a new round, start every unit's moments at zero, or carry those of units that go on training."""
    hft_resting_moments: Literal["drop", "host"] = "drop"
    """Under --hft-moments carry: forget the moments of a unit that rests, or keep them in host memory meanwhile."""
    hft_lr_schedule: Literal["run", "round"] = "run"
    """One warm-up and decay over the whole run, or one in every round."""
    hft_freeze_embedding: bool = False
    """Rest the embedding in every round; with tied embeddings only together with --hft-freeze-head."""
    hft_freeze_head: bool = False
    """Rest the head in every round."""
    hft_train: str | None = None
    """Units that train in every round: comma-separated patterns over Hugging Face names, such as
    `model.layers.0.*,*.q_proj`; they win over the draw."""
    hft_freeze: str | None = None
    """Units that rest in every round: comma-separated patterns over Hugging Face names."""
    hft_plan: str | None = None
    """Plan file of `hft-megatron plan --save`, possibly edited, instead of a draw."""
    hft_audit: bool = False
    """Fingerprint every resting shard at the start of a round and verify it at the end."""
    hft_audit_interval: int | None = None
    """Verify every N iterations as well (needs --hft-audit)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is written and read back."""

    save: str | None = None
    """Folder of the run: checkpoints with their plans, metrics.jsonl, the resolved config."""
    load: str | None = None
    """Folder of a run to resume from its newest complete checkpoint; without one the run starts fresh, which one line
    says. Load only folders you trust: torch reads a checkpoint's index with pickle."""
    load_fallback: bool = False
    """Where the newest checkpoint is damaged, go on from the newest good one instead of stopping."""
    finetune: bool = False
    """Take only the weights of --load and start a new run from them, with its own rounds, data and schedule. Where
    --save holds a checkpoint of that run already, the run goes on from there."""
    override_opt_param_scheduler: bool = False
    """On resume, use this command's schedule and optimizer options (--lr, --min-lr, the length of the decay,
    --weight-decay, --adam-beta1 and so on) where the checkpoint has others. That is also done without it, with a
    warning."""
    use_checkpoint_opt_param_scheduler: bool = False
    """On resume, use the checkpoint's values of those options, and its length of the decay, instead of this command's:
    a run that is made longer keeps its learning rates."""
    save_interval: int | None = None
    """Iterations between checkpoints; the last iteration is always saved when --save is given."""
    keep_last: int | None = None
    """Delete all but this many of the newest checkpoints after each save; all are kept when unset."""
    save_retain_interval: int | None = None
    """Keep checkpoints at multiples of this many iterations and delete others, except the newest (or --keep-last)."""
    async_save: bool = False
    """Write checkpoints in the background while training goes on."""
    save_trained_only: bool = False
    """Leave the weights that rest in the round out of checkpoints: those are in the --load-hf folder or, from the
    second round on, in the round's first checkpoint, which is whole. Both are checked when such a one is loaded."""
    save_hf: str | None = None
    """Folder to export to in Hugging Face's format at the end."""
    save_hf_interval: int | None = None
    """Iterations between exports during training, each to its own folder in --save-hf, such as iter_0000500."""
    save_hf_keep: int | None = None
    """Delete all but this many of the newest of those, and the best; all are kept when unset."""
    save_hf_best: str | None = None
    """Metric of the validation data, such as `lm loss`, whose best export is named in exports.json and is not deleted.
    Validations must come at every export (--eval-interval)."""
    save_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Data type of all tensors in the export; each tensor's own in the source folder (or the run's) when unset."""
    keep_source_tokenizer: bool = False
    """Copy the source folder's tokenizer files to the export also where transformers makes other ids of them than were
    trained. Without it the export then has files with which it gives those; a line in the log says so."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a person or a dashboard sees."""

    log_interval: int = 1
    loss_spike_threshold: float | None = None
    """Mark an iteration in the log and the metrics whose loss is more than this many robust standard deviations (1.4826
    times the median absolute deviation) from the median of the last 100 iterations."""
    eval_interval: int | None = None
    """Iterations between validations; needs --valid-data-path, or --eval-iters where a corpus is pre-trained on."""
    eval_iters: int | None = None
    """Global batches of one validation; the whole file when unset, and no validation on a corpus."""
    tensorboard_dir: str | None = None
    wandb_project: str | None = None
    wandb_exp_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. On the command line the groups are flat: ``--lr``, not ``--optimizer.lr``."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    hft: HFTConfig = field(default_factory=HFTConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
