"""Check that a layout fits into a device's memory, and proposals that would fit: by formula, without torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from hft_megatron.config.declared import flag
from hft_megatron.config.parallel import ParallelConfig, end_words, proposed_split
from hft_megatron.config.training import TrainingConfig
from hft_megatron.costs.rank_memory import MemoryModel, RankMemory

LARGEST_WORLD = 4096
"""Largest world size for which layouts are searched, in powers of two."""
MOST_TENSOR_RANKS = 8
"""Limit of a proposed layout: beyond the GPUs of one machine tensor parallelism is slow."""
MOST_PROPOSALS = 3
_FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_RECOMPUTATIONS: tuple[dict[str, Any], ...] = ({"recompute_granularity": "selective"}, _FULL)
"""Recomputation that may be added, the cheaper one first."""

Trains = Callable[[str], bool]


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Options that would fit."""

    words: str
    total: int
    """Bytes on the rank that holds most under these options."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Verdict on the plan, or on full fine-tuning."""

    memory: RankMemory
    """Memory of the rank that holds most."""
    fits: bool
    layouts: tuple[Proposal, ...]
    """Layouts for the given options, on the fewest ranks that suffice; the least model-parallel first."""
    options: tuple[Proposal, ...]
    """Changes for the given layout, the fewest that fit; none where it fits already."""


def verdict(model: MemoryModel, trains: Trains, room: int) -> Verdict:
    """Judges training the units for which ``trains`` is true; ``room`` is what the device holds, in bytes."""
    memory = model.largest(trains)
    fits = memory.total <= room
    return Verdict(
        memory=memory,
        fits=fits,
        layouts=_smallest_layouts(model, trains, room),
        options=() if fits else _nearest_options(model, trains, room),
    )


def _smallest_layouts(model: MemoryModel, trains: Trains, room: int) -> tuple[Proposal, ...]:
    replicas = [(one, one.largest(trains)) for one in _replicas(model)]
    world = 1
    while world <= LARGEST_WORLD:
        found = []
        for replica, memory in replicas:
            data, rest = divmod(world, replica.costs.world_size)
            # Data-parallel ranks share only the optimizer: most layouts need no closer look.
            if rest or memory.total - memory.optimizer + memory.optimizer // max(data, 1) > room:
                continue
            total = replace(replica, costs=replace(replica.costs, world_size=world)).largest(trains).total
            if total <= room:
                found.append(Proposal(words=_layout_words(replica.costs.parallel, data), total=total))
        if found:
            return tuple(found[:MOST_PROPOSALS])
        world *= 2
    return ()


def _replicas(model: MemoryModel) -> Iterator[MemoryModel]:
    """One replica under each model-parallel layout that the model allows, the smallest first, then the least pipelined.

    Sizes that are not powers of two divide no world size that is searched.
    """
    shape, given = model.costs.shape, model.costs.parallel
    cut = (shape.num_attention_heads, shape.num_query_groups, shape.ffn_hidden_size)
    powers = [2**exponent for exponent in range(LARGEST_WORLD.bit_length())]
    tensors = [size for size in powers if size <= MOST_TENSOR_RANKS and not any(count % size for count in cut)]
    pipelines = [size for size in powers if size <= shape.num_layers]
    splits = {size: _split(given, size, shape.num_layers) for size in pipelines}
    for tensor, pipeline in sorted(product(tensors, pipelines), key=lambda pair: (pair[0] * pair[1], pair[1])):
        parallel = replace(
            splits[pipeline],
            tensor_model_parallel_size=tensor,
            sequence_parallel=given.sequence_parallel and tensor > 1,
        )
        yield replace(model, costs=replace(model.costs, parallel=parallel, world_size=tensor * pipeline))


def _split(given: ParallelConfig, stages: int, num_layers: int) -> ParallelConfig:
    """``given`` with ``stages`` stages: its own uneven split where it has as many, else as even as possible."""
    plain = replace(given, pipeline_model_parallel_size=stages, num_layers_per_virtual_pipeline_stage=None)
    if stages == given.pipeline_model_parallel_size:
        return plain
    return proposed_split(plain, num_layers)


def _layout_words(parallel: ParallelConfig, data: int) -> str:
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ends = f" with {end_words(parallel)}" if end_words(parallel) else ""
    return f"TP {tensor} x PP {pipeline} x DP {data}{ends}"


def _nearest_options(model: MemoryModel, trains: Trains, room: int) -> tuple[Proposal, ...]:
    found: list[tuple[int, Proposal]] = []
    for changes, candidate in _changes(model):
        total = candidate.largest(trains).total
        if total <= room:
            found.append((len(changes), Proposal(words=" ".join(changes), total=total)))
    fewest = min((count for count, _ in found), default=0)
    return tuple(proposal for count, proposal in found if count == fewest)[:MOST_PROPOSALS]


def _changes(model: MemoryModel) -> Iterator[tuple[list[str], MemoryModel]]:
    """Options to add to the command and the model under them: the least costly of each kind first."""
    parallel, sequences = model.costs.parallel, model.micro_batch.sequences
    can_cut = parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel
    cutting = (False, True) if can_cut else (False,)
    halves = [sequences >> step for step in range(1, sequences.bit_length())]
    for recompute, size, cuts in product(_more_recomputation(model.training), (None, *halves), cutting):
        words: list[str] = []
        candidate = model
        if cuts:
            words.append("--sequence-parallel")
            cut = replace(parallel, sequence_parallel=True)
            candidate = replace(candidate, costs=replace(candidate.costs, parallel=cut))
        if size is not None:
            words.append(f"--micro-batch-size {size}")
            candidate = replace(candidate, micro_batch=replace(model.micro_batch, sequences=size))
        if recompute:
            words.append(" ".join(f"{flag(name)} {value}" for name, value in recompute.items()))
            plain = replace(model.training, recompute_method=None, recompute_num_layers=None)
            candidate = replace(candidate, training=replace(plain, **recompute))
        if words:
            yield words, candidate


def _more_recomputation(training: TrainingConfig) -> tuple[dict[str, Any], ...]:
    """No change, and every setting that recomputes more than the given options do."""
    if training.recompute_granularity == "full":
        everything = training.recompute_method == "uniform" and training.recompute_num_layers == 1
        return ({},) if everything else ({}, _FULL)
    return ({}, *_RECOMPUTATIONS[1 if training.recompute_granularity == "selective" else 0 :])
