"""A model's whole tensors -> safetensors, one after the other: gathered from this run's ranks, or from any reader."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.conversion.shard_writer import MAX_SHARD_BYTES, ShardWriter
from hft_megatron.errors import RunFailed
from hft_megatron.hft.units import units_of
from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.parameter_names import whole_shape
from hft_megatron.model.parameters import ParameterSlot, parameter_slots
from hft_megatron.parallel.consensus import gathered
from hft_megatron.parallel.groups import Placement
from hft_megatron.parallel.meeting import wait_for_all_ranks

Announce = Callable[[str], None]
_NO_VALUES: Mapping[Parameter, Tensor] = {}


@dataclass(frozen=True, kw_only=True)
class ExportRules:
    """Source and data type of each tensor of the export."""

    source: str | None
    """Hugging Face folder the run started from, if any."""
    trained: frozenset[str]
    """Units that a step of this run may have changed; others are the source's, or another run's result (--finetune)."""
    save_dtype: torch.dtype | None
    """Data type asked for by --save-dtype; None: the source's own, or the run's."""
    adds_template: bool = True
    """True to add the chat template in use to a tokenizer that has none of its own."""
    keep_source_tokenizer: bool = False
    """True to copy the tokenizer's files even if transformers makes other ids of them than were trained."""


def write_weights(
    folder: Path,
    wholes: Iterable[tuple[str, Tensor]],
    shape: ModelShape,
    run_dtype: torch.dtype,
    rules: ExportRules,
    announce: Announce,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> torch.dtype:
    """Writes safetensors to ``folder``, holding one tensor at a time. Returns the data type of most parameters.

    ``wholes`` gives (unit, whole tensor) in the order of ``units_of(shape)``. Where ``run_dtype`` cannot hold the
    source's values (fp16 or fp32 trained as bf16), frozen tensors are copied from the source, so that they are its bit
    for bit, and trained ones are written in the source's data type. Frozen tensors that are not the source's, because
    the run took them from another run's checkpoint, are written like trained ones.
    """
    units = units_of(shape)
    copied = 0
    with nullcontext() if rules.source is None else HuggingFaceWeights(rules.source) as source:
        stored = {unit.name: run_dtype if source is None else source.dtype(f"{unit.name}.weight") for unit in units}
        written = {unit: rules.save_dtype or dtype for unit, dtype in stored.items()}
        announced = [(f"{unit}.weight", dtype, whole_shape(unit, shape)) for unit, dtype in written.items()]
        writer = ShardWriter(folder, announced, max_shard_bytes=max_shard_bytes)
        for unit, whole in wholes:
            value = whole
            if unit not in rules.trained and torch.promote_types(run_dtype, stored[unit]) != run_dtype:
                assert source is not None, "without a source, tensors are stored in the run's data type"
                original = source.read(f"{unit}.weight")
                if torch.equal(original.to(run_dtype), whole):
                    value = original
                    copied += 1
            writer.write(f"{unit}.weight", value.to(written[unit]))
            del whole, value  # or they would live while the next one is made
        writer.close()
    parameters: Counter[torch.dtype] = Counter()
    for each in units:
        parameters[written[each.name]] += each.parameters
    [(dtype, _)] = parameters.most_common(1)
    if copied:
        announce(
            f"export: {run_dtype} cannot hold the source's values, so {copied} frozen tensors are copied from "
            f"{rules.source} and trained ones are written as {dtype}"
        )
    return dtype


def gathered_weights(
    chunks: Sequence[LlamaModel],
    shape: ModelShape,
    placement: Placement,
    *,
    only_adapters: bool = False,
    values: Mapping[Parameter, Tensor] = _NO_VALUES,
) -> Iterator[tuple[str, Tensor]]:
    """Yields every unit with its whole tensor on rank 0 (CPU), in the order of ``units_of``; on other ranks nothing.

    ``shape`` is that of the chunks, including their adapters; ``only_adapters`` leaves other units out.
    ``values``, unless empty, are fp32 values of all yielded parameters, in place of their own, on data-parallel rank 0.
    Every rank must run it to its end, which it reaches when rank 0 has taken the last tensor.
    """
    slots = {slot.unit: slot for slot in parameter_slots(chunks) if not _is_tied_copy(slot, shape)}
    speaks = placement.data_rank == 0 and placement.tensor_rank == 0
    owned = gathered((placement.rank, list(slots)) if speaks else None)
    owner_of = {unit: rank for entry in owned if entry is not None for rank, units in [entry] for unit in units}
    for unit in (unit.name for unit in units_of(shape) if unit.category == "adapter" or not only_adapters):
        # Rank 0 comes here when it has written the unit before. Until then the others hold no copies of theirs, and
        # no rank waits for it in a collective, which would time out.
        wait_for_all_ranks()
        whole = None
        if placement.data_rank == 0 and unit in slots:
            whole = _gather_tensor_ranks(slots[unit], values, shape, placement)
        if owner_of[unit] != 0:
            if placement.rank == owner_of[unit]:
                assert whole is not None
                dist.send(whole.contiguous(), 0)
                torch.cuda.synchronize()  # On NCCL the send is only queued, and keeps its tensor.
            elif placement.rank == 0:
                dtype = torch.float32 if values else next(iter(slots.values())).parameter.dtype
                whole = torch.empty(whole_shape(unit, shape), dtype=dtype, device=placement.device)
                dist.recv(whole, owner_of[unit])
        if placement.rank == 0:
            assert whole is not None
            here, whole = whole.cpu(), None
            yield unit, here
            del here


def write_on_rank_0(
    write: Callable[[], object],
    wholes: Iterable[tuple[str, Tensor]],
    placement: Placement,
    *,
    what: str,
    caught: tuple[type[Exception], ...],
) -> None:
    """Calls ``write`` on rank 0, which takes ``gathered_weights`` one by one; every rank must call it.

    Raises RunFailed on every rank, with ``what`` as the subject, where it raises one of ``caught``. No rank waits for
    the writing in a collective.
    """
    reasons: list[str | None] = [None]
    if placement.rank == 0:
        try:
            write()
        except caught as error:
            reasons = [f"{what} cannot be written: {error}"]
    # After a failure the others still send what they hold.
    for _ in wholes:
        assert placement.rank == 0, "only rank 0 is given tensors"
    wait_for_all_ranks()
    dist.broadcast_object_list(reasons, src=0)
    if reasons[0] is not None:
        raise RunFailed(reasons[0])


def _is_tied_copy(slot: ParameterSlot, shape: ModelShape) -> bool:
    return shape.tie_embeddings and slot.local_name.startswith("output_layer")


def _gather_tensor_ranks(
    slot: ParameterSlot, values: Mapping[Parameter, Tensor], shape: ModelShape, placement: Placement
) -> Tensor | None:
    """The whole tensor on tensor rank 0, without the rows that pad the vocabulary."""
    local = values.get(slot.parameter, slot.parameter).detach().to(slot.parameter.device)
    if slot.cut is None:
        return local if placement.tensor_rank == 0 else None
    if placement.tensor_size > 1:
        # Not gather: NCCL has the one on every version, and the extra copies live for one matrix only.
        parts = local.new_empty((placement.tensor_size * local.size(0), *local.shape[1:]))
        dist.all_gather_into_tensor(parts, local.contiguous(), group=placement.groups.tp)
        if placement.tensor_rank != 0:
            return None
        local = parts if slot.cut == 0 else torch.cat(parts.chunk(placement.tensor_size), dim=slot.cut)
    return local.narrow(slot.cut, 0, whole_shape(slot.unit, shape)[slot.cut])
