"""Numbers that follow from the options, the model's shape and the world size. Pure functions, valid options assumed."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

from hft_megatron.config.batch_sizes import BatchSizes

if TYPE_CHECKING:
    from hft_megatron.config.dpo import DpoConfig
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.optimizer import OptimizerConfig
    from hft_megatron.config.parallel import ParallelConfig
    from hft_megatron.config.run import RunConfig
    from hft_megatron.config.training import TrainingConfig

WHOLE_BYTES = 2**30
"""Bytes of fp32 logits on a rank up to which all tokens are one chunk."""
CHUNK_BYTES = 2**29
"""Largest size in bytes of a chunk's fp32 logits, where there are several chunks."""
_FP32_BYTES = 4


def tokens_of_a_chunk(tokens: int, rows: int) -> int:
    """The tokens whose logits over ``rows`` of the vocabulary are in memory at once: all of them, or a chunk."""
    row_bytes = rows * _FP32_BYTES
    return tokens if tokens * row_bytes <= WHOLE_BYTES else max(1, CHUNK_BYTES // row_bytes)


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Replicas of the model: ranks / (tensor-parallel size x pipeline-parallel size)."""
    return world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)


def splits_sequences(parallel: ParallelConfig) -> bool:
    """Return whether --sequence-parallel splits anything: without tensor parallelism it is off, as in Megatron."""
    return parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1


def global_batch_size(config: RunConfig, world_size: int) -> int:
    """Sequences of one optimizer step; one micro-batch per data-parallel rank when the option is unset."""
    if config.training.global_batch_size is not None:
        return config.training.global_batch_size
    return config.training.micro_batch_size * data_parallel_size(config.parallel, world_size)


def batch_sizes(config: RunConfig, world_size: int) -> BatchSizes:
    """Sequences of every optimizer step."""
    return BatchSizes(full=global_batch_size(config, world_size), ramp=config.training.rampup_batch_size)


def virtual_pipeline_size(parallel: ParallelConfig, num_layers: int) -> int | None:
    """Model chunks of one pipeline rank under the interleaved schedule; None is the plain 1F1B schedule."""
    if parallel.num_layers_per_virtual_pipeline_stage is None:
        return None
    return num_layers // (parallel.pipeline_model_parallel_size * parallel.num_layers_per_virtual_pipeline_stage)


def layers_per_stage(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...]:
    """Transformer layers of every pipeline stage, first to last: the sizes set by --decoder-first-pipeline-num-layers
    and --decoder-last-pipeline-num-layers, and equal shares of the rest, rounded down (Megatron's rule)."""
    ends = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    first, last = ([] if layers is None else [layers] for layers in ends)
    equal_stages = parallel.pipeline_model_parallel_size - len(first) - len(last)
    share = (num_layers - sum(first) - sum(last)) // max(equal_stages, 1)
    return (*first, *[share] * equal_stages, *last)


def layers_of_chunks(parallel: ParallelConfig, num_layers: int) -> tuple[range, ...]:
    """Layers of every model chunk, from the bottom of the model up: every stage's one, then every stage's next one.

    Under the interleaved schedule a stage has several chunks of equal size, elsewhere one. Chunk ``i`` belongs to the
    stage ``i`` modulo --pipeline-model-parallel-size (Megatron's rule).
    """
    turns = virtual_pipeline_size(parallel, num_layers) or 1
    sizes = [layers // turns for layers in layers_per_stage(parallel, num_layers)] * turns
    return tuple(range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True))


def padded_vocab_size(shape: ModelShape, tensor_parallel_size: int, divisible_by: int) -> int:
    """Embedding rows over all tensor-parallel ranks: the vocabulary rounded up to a multiple of
    ``divisible_by`` x ``tensor_parallel_size`` (Megatron's rule)."""
    multiple = divisible_by * tensor_parallel_size
    return math.ceil(shape.vocab_size / multiple) * multiple


def sequence_length(training: TrainingConfig, shape: ModelShape) -> int:
    """Longest training sequence in tokens: --seq-length, or the model's own limit."""
    return shape.max_position_embeddings if training.seq_length is None else training.seq_length


def averages_log_probs(dpo: DpoConfig) -> bool:
    """Return whether log-probabilities are divided by the tokens of their answer; when unset, those of IPO are."""
    return dpo.dpo_loss == "ipo" if dpo.dpo_average_log_probs is None else dpo.dpo_average_log_probs


DEFAULT_TRAIN_ITERS = 100


def train_iters(training: TrainingConfig) -> int:
    """Optimizer steps. The steps of --train-epochs are known, as --train-iters, once the data has been read; those of
    --train-samples need resolved options."""
    known = known_train_iters(training)
    if known is not None:
        return known
    assert training.train_epochs is None, "epochs become iterations when the data has been read"
    assert training.train_samples is None, "samples become iterations when the batch size is resolved"
    return DEFAULT_TRAIN_ITERS


def only_validates(config: RunConfig) -> bool:
    """Return whether the command trains nothing (--train-iters 0) and validates its weights."""
    corpus, data = config.corpus, config.data
    of_corpus = config.logging.eval_iters is not None and (bool(corpus.data_path) or corpus.mock_data)
    return config.training.train_iters == 0 and (bool(data.valid_data_path) or of_corpus)


def known_train_iters(training: TrainingConfig) -> int | None:
    """Optimizer steps if these options fix them; None if they depend on the data or the ranks, or are not given."""
    if training.train_samples is None or training.global_batch_size is None:
        return training.train_iters
    sizes = BatchSizes(full=training.global_batch_size, ramp=training.rampup_batch_size)
    return sizes.iterations_of(training.train_samples)


def schedule_unit(training: TrainingConfig) -> str:
    """The unit of the schedule, as the names of options end: ``iters``, or ``samples`` under --train-samples."""
    return "iters" if training.train_samples is None else "samples"


def schedule_length(config: RunConfig) -> int:
    """Steps of the schedule that the run follows, or has a part of, in its unit."""
    training, whole = config.training, config.optimizer.lr_schedule_iters
    if whole is not None:
        return whole
    return train_iters(training) if training.train_samples is None else training.train_samples


def decay_steps(optimizer: OptimizerConfig, span: int) -> int:
    """Steps from the start of the schedule to the end of its decay; ``span`` are those of the run or the round."""
    given = optimizer.lr_decay_iters if optimizer.lr_decay_samples is None else optimizer.lr_decay_samples
    return span if given is None else given


def warmup_steps(optimizer: OptimizerConfig, span: int) -> int:
    """Steps of linear warm-up, from any form of the option; a fraction is rounded to the nearest step."""
    if optimizer.lr_warmup_fraction is None:
        return optimizer.lr_warmup_samples or optimizer.lr_warmup_iters
    return round(optimizer.lr_warmup_fraction * decay_steps(optimizer, span))


def wsd_decay_steps(optimizer: OptimizerConfig) -> int | None:
    """Steps at the end of --lr-decay-style WSD in which the rate comes down; None for other styles."""
    return optimizer.lr_wsd_decay_iters if optimizer.lr_wsd_decay_samples is None else optimizer.lr_wsd_decay_samples


def hft_seed(config: RunConfig) -> int:
    """Seed of the draws: --hft-seed, or --seed."""
    return config.training.seed if config.hft.hft_seed is None else config.hft.hft_seed


def patterns(listed: str | None) -> tuple[str, ...]:
    """The patterns of --hft-train or --hft-freeze, without the blanks around them; none when the option is unset."""
    return () if listed is None else tuple(pattern.strip() for pattern in listed.split(","))


def tokenizer_path(config: RunConfig) -> str:
    """Path that the tokenizer is read from: --tokenizer-model, or the --load-hf folder."""
    path = config.data.tokenizer_model or config.model.load_hf
    assert path is not None, "validate() refuses a run without a tokenizer"
    return path


def resolve(config: RunConfig, shape: ModelShape, world_size: int, saved: RunConfig | None = None) -> RunConfig:
    """The options with every unset one that has a derived value filled in, as written next to the run.

    A resumed run keeps what it started with: values that this command leaves unset come from ``saved``, the
    run's resolved options, so that another layout does not change the batch size or the dtype. ``bf16`` stays
    unset unless an option sets it: the machine decides, which only the caller knows.
    """
    training, hft = config.training, config.hft
    if saved is not None:
        kept = ("global_batch_size", "seq_length", "bf16")
        unset = {name: getattr(saved.training, name) for name in kept if getattr(training, name) is None}
        training = replace(training, **unset)
        if hft.hft_seed is None:
            hft = replace(hft, hft_seed=saved.hft.hft_seed)
    checkpoint, lora = config.checkpoint, config.lora
    if lora.lora_rank is not None or lora.lora_adapter is not None:
        # All adapters train, and checkpoints hold them alone.
        hft = replace(hft, hft_ratio=1.0)
        checkpoint = replace(checkpoint, save_trained_only=checkpoint.save is not None)
    config = replace(config, training=training, hft=hft, checkpoint=checkpoint)
    return replace(
        config,
        training=replace(
            training,
            global_batch_size=global_batch_size(config, world_size),
            seq_length=sequence_length(training, shape),
            train_iters=train_iters(training) if training.train_epochs is training.train_samples is None else None,
        ),
        hft=replace(hft, hft_seed=hft_seed(config)),
    )
