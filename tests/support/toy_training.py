"""Short runs of the real engine without files of data, on a task that a tiny LLaMA learns in twenty steps."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hft_megatron.checkpoint.position import TrainState
from hft_megatron.config.batch_sizes import BatchSizes
from hft_megatron.config.derived import train_iters
from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.lora import LoraConfig
from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.config.optimizer import OptimizerConfig
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.data.batches import BatchesInOrder, BatchShare, ExampleBatches, ShuffledBatches
from hft_megatron.data.dataset import ExamplesInMemory, SftDataset, SourcePart
from hft_megatron.data.examples import SftCounts
from hft_megatron.data.order import PackedOrder, PackingRule, SampleOrder, SampleStream
from hft_megatron.data.record_errors import RecordUse
from hft_megatron.hft.plan import Plan, make_plan
from hft_megatron.hft.rounds import RoundSchedule
from hft_megatron.methods.next_token import NEXT_TOKEN
from hft_megatron.model.parameters import parameter_slots
from hft_megatron.optimizer.wrapping import wrap
from hft_megatron.tracking.tracker import CompositeTracker
from hft_megatron.trainer.loop import learning_rate, next_step
from hft_megatron.trainer.rounds import Rounds
from hft_megatron.trainer.run import Run
from tests.support.models import build_from_folder

STEPS = 20
GLOBAL_BATCH = 8
SEED = 7
PAD = 0
LONGEST = 96
OPTIMIZER = OptimizerConfig(lr=1e-2, min_lr=1e-3, lr_warmup_iters=4, weight_decay=0.1, clip_grad=1.7)
"""Optimizer that is fast enough to learn much in ``STEPS``."""
TINY = {"hidden_size": 32, "intermediate_size": 56}
"""Sizes for ``make_llama`` under which twenty steps take about a second."""


def toy_dataset(examples: int = 48, seed: int = SEED) -> SftDataset:
    """Examples of very different lengths where each token names the next one; the first third is not trained.

    Most steps are padded to 64 tokens and some to 96, so that step lengths differ.
    """
    rng = np.random.default_rng(seed)
    successor = 3 + np.random.default_rng(0).permutation(24)  # one task, whatever the seed of the examples
    tokens, trained, offsets = [], [], [0]
    for number in range(examples):
        length = LONGEST + 1 if number % 16 == 0 else int(rng.integers(6, 60))
        example = [int(rng.integers(3, 27))]
        while len(example) < length:
            example.append(int(successor[example[-1] - 3]))
        tokens += example
        trained += [position >= length // 3 for position in range(length)]
        offsets.append(len(tokens))
    return SftDataset(
        parts=(
            SourcePart(
                path="toy",
                weight=None,
                formats=("text",),
                files=("toy",),
                examples=examples,
                counts=SftCounts(),
                use=RecordUse(),
            ),
        ),
        stores=(
            ExamplesInMemory(
                tokens=np.array(tokens, dtype=np.int32),
                trained=np.array(trained, dtype=np.bool_),
                offsets=np.array(offsets, dtype=np.int64),
                places=np.array([f"0:{number + 1}" for number in range(examples)], dtype=np.bytes_),
            ),
        ),
        seq_length=LONGEST,
        digest="toy",
    )


def toy_samples(*, packed: bool = False) -> SampleStream:
    """The toy data in its order; packed, three or four examples of very different lengths share a pack."""
    dataset = toy_dataset()
    order = SampleOrder(num_examples=len(dataset), seed=SEED)
    if not packed:
        return order
    rule = PackingRule(capacity=LONGEST, algorithm="first_fit_shuffle", window=20)
    return PackedOrder(order, dataset.lengths - 1, rule)


def toy_batches(share: BatchShare, *, packed: bool = False) -> ShuffledBatches:
    order = toy_samples(packed=packed)
    batches = ExampleBatches(dataset=toy_dataset(), pad_id=PAD, share=share)
    return ShuffledBatches(batches=batches, order=order, packed=packed)


def toy_plan(folder: str, hft: HFTConfig) -> Plan:
    """The plan of a run's first round."""
    shape = ModelShape.from_hf_config(load_hf_config(folder), folder)
    return make_plan(shape, hft, default_seed=SEED)


def make_run(
    folder: str,
    layout: dict[str, Any],
    *,
    ratio: float = 0.5,
    training: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    hft: dict[str, Any] | None = None,
    lora: LoraConfig | None = None,
) -> Run:
    """This rank's run over the toy data from a Hugging Face folder.

    ``layout``, ``training``, ``optimizer`` and ``hft`` hold fields of ParallelConfig, TrainingConfig, OptimizerConfig
    and HFTConfig; with ``lora`` its new adapters train instead.
    """
    options: dict[str, Any] = {"global_batch_size": GLOBAL_BATCH, "train_iters": STEPS, "bf16": False}
    config = RunConfig(
        parallel=ParallelConfig(**layout),
        training=TrainingConfig(**options | (training or {})),
        optimizer=replace(OPTIMIZER, **(optimizer or {})),
        hft=HFTConfig(hft_ratio=ratio, **(hft or {})),
    )
    bf16 = config.training.bf16 is True
    dtype = torch.bfloat16 if bf16 else torch.float32
    chunks, shape, placement = build_from_folder(folder, layout, dtype, config.training, lora)
    schedule = RoundSchedule(
        interval=config.hft.hft_round_interval,
        train_iters=train_iters(config.training),
        epoch_starts=toy_samples().epoch_starts(train_iters(config.training) * GLOBAL_BATCH),
        batches=BatchSizes(full=GLOBAL_BATCH),
    )
    rounds = Rounds(schedule, lambda round: make_plan(shape, config.hft, default_seed=SEED, round=round))
    carries = config.hft.hft_moments == "carry"
    wrapped = wrap(
        chunks,
        rounds.plan(0),
        config.parallel,
        config.optimizer,
        bf16=bf16,
        fp32_gradients=config.training.accumulate_allreduce_grads_in_fp32,
        steps_per_unit=carries,
    )
    assert config.training.global_batch_size is not None
    share = BatchShare(
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
        data_parallel_rank=placement.data_rank,
        data_parallel_size=placement.data_size,
        length_multiple=placement.tensor_size,
    )
    return Run(
        config=config,
        placement=placement,
        rounds=rounds,
        wrapped=wrapped,
        objective=NEXT_TOKEN,
        batches=toy_batches(share),
        validation={
            "toy": BatchesInOrder(
                batches=ExampleBatches(dataset=toy_dataset(examples=11, seed=SEED + 1), pad_id=PAD, share=share)
            )
        },
        learning_rate=learning_rate(wrapped, rounds, config, TrainState()),
        tracker=CompositeTracker(),
        announce=lambda line: None,
        state=TrainState(),
    )


def take_steps(run: Run, steps: int) -> list[tuple[float | None, float]]:
    """(loss, gradient norm) of each step, with new rounds in between; the loss is None off the last stage."""
    results = []
    for _ in range(steps):
        result = next_step(run)
        results.append((result.loss, result.grad_norm))
    return results


def local_weights(run: Run) -> dict[tuple[str, str], torch.Tensor]:
    """Copies of this rank's parameters by unit and local name, newest values (a tied unit has two on one rank)."""
    with run.wrapped.gathered_parameters():
        return {
            (slot.unit, slot.local_name): slot.parameter.detach().clone()
            for slot in parameter_slots(run.wrapped.modules)
        }
