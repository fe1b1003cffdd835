"""This run's parameters -> safetensors: gathered to rank 0 unit by unit, written shard by shard."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.conversion.hf_folder import INDEX_FILE, SINGLE_FILE, HuggingFaceWeights
from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.parameter_names import whole_shape
from hft_megatron.model.parameters import ParameterSlot, parameter_slots
from hft_megatron.parallel.groups import Placement

MAX_SHARD_BYTES = 5_000_000_000
"""Size of one output file, and the most that rank 0 holds at once; Hugging Face's usual shard size."""

Announce = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExportRules:
    """Where each tensor of the export comes from and in what data type it is written."""

    source: str | None
    """Hugging Face folder the run started from, if any."""
    trained: frozenset[str]
    """Units that a step may have changed; all others still are what the source holds."""
    save_dtype: torch.dtype | None
    """Asked for by --save-dtype; the source's own data type (or the run's) when None."""


def save_weights(
    folder: Path,
    chunks: Sequence[LlamaModel],
    shape: ModelShape,
    placement: Placement,
    rules: ExportRules,
    announce: Announce,
) -> torch.dtype:
    """Writes safetensors (one file, or shards and an index) on rank 0; every rank must call it. Returns the data type.

    Where the run's data type can't hold the source's values (fp16 or fp32 trained as bf16), tensors that rested are
    copied from the source, so that they are its bit for bit, and trained ones are written in the source's data type.
    """
    slots = {slot.unit: slot for slot in parameter_slots(chunks) if not _is_tied_copy(slot, shape)}
    run_dtype = next(chunks[0].parameters()).dtype
    written_dtype = rules.save_dtype or run_dtype
    copied = 0
    with ExitStack() as stack:
        source, writer = None, None
        if placement.rank == 0:
            writer = _ShardWriter(folder)
            source = stack.enter_context(HuggingFaceWeights(rules.source)) if rules.source is not None else None
        for unit, whole in _gather_units(slots, shape, placement):
            if writer is None or whole is None:
                continue
            name = f"{unit}.weight"
            if source is not None:
                stored = source.dtype(name)
                written_dtype = rules.save_dtype or stored
                if unit not in rules.trained and torch.promote_types(run_dtype, stored) != run_dtype:
                    whole = source.read(name)
                    copied += 1
            writer.add(name, whole.to(written_dtype))
        if writer is not None:
            writer.close()
    if copied:
        announce(
            f"export: {run_dtype} can't hold the source's values, so {copied} resting tensors are copied from "
            f"{rules.source} and trained ones are written as {written_dtype}"
        )
    return written_dtype


def _is_tied_copy(slot: ParameterSlot, shape: ModelShape) -> bool:
    return shape.tie_embeddings and slot.local_name.startswith("output_layer")


def _gather_units(
    slots: dict[str, ParameterSlot], shape: ModelShape, placement: Placement
) -> Iterator[tuple[str, Tensor | None]]:
    """Yields every unit with its whole tensor on rank 0 (CPU) and None elsewhere, in the model's order on all ranks."""
    owned: list[tuple[int, list[str]] | None] = [None] * placement.world_size
    speaks = placement.data_rank == 0 and placement.tensor_rank == 0
    dist.all_gather_object(owned, (placement.rank, list(slots)) if speaks else None)
    owner_of = {unit: rank for entry in owned if entry is not None for rank, units in [entry] for unit in units}
    for unit in sorted(owner_of, key=_model_order):
        whole = None
        if placement.data_rank == 0 and unit in slots:
            whole = _gather_tensor_ranks(slots[unit], shape, placement)
        if owner_of[unit] != 0:
            if placement.rank == owner_of[unit]:
                assert whole is not None
                dist.send(whole.contiguous(), 0)
                whole = None
            elif placement.rank == 0:
                dtype = next(iter(slots.values())).parameter.dtype
                whole = torch.empty(whole_shape(unit, shape), dtype=dtype, device=placement.device)
                dist.recv(whole, owner_of[unit])
        yield unit, whole.cpu() if whole is not None and placement.rank == 0 else None


def _model_order(unit: str) -> tuple[int, int, str]:
    """Embedding, layers by number, final norm, head: files then read from front to back."""
    parts = unit.split(".")
    if parts[1:2] == ["layers"]:
        return 1, int(parts[2]), unit
    return (0 if unit.endswith("embed_tokens") else 2), 0, unit


def _gather_tensor_ranks(slot: ParameterSlot, shape: ModelShape, placement: Placement) -> Tensor | None:
    """The whole tensor on tensor rank 0, without the rows that pad the vocabulary."""
    local = slot.parameter.detach()
    if slot.cut is None:
        return local if placement.tensor_rank == 0 else None
    if placement.tensor_size > 1:
        parts = [torch.empty_like(local) for _ in range(placement.tensor_size)]
        # all_gather, not gather: NCCL has the one on every version, and the extra copies live for one matrix only.
        dist.all_gather(parts, local.contiguous(), group=placement.groups.tp)
        local = torch.cat(parts, dim=slot.cut)
    if placement.tensor_rank != 0:
        return None
    return local.narrow(slot.cut, 0, whole_shape(slot.unit, shape)[slot.cut])


class _ShardWriter:
    """Collects tensors up to ``MAX_SHARD_BYTES`` and writes them; names the files once their number is known."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = 0
        self.total_bytes = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > MAX_SHARD_BYTES:
            self._write()
        self.pending[name] = tensor.contiguous()
        self.pending_bytes += size
        self.total_bytes += size

    def _write(self) -> None:
        save_file(self.pending, self.folder / f"shard-{len(self.shards)}", metadata={"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def close(self) -> None:
        self._write()
        if len(self.shards) == 1:
            (self.folder / "shard-0").rename(self.folder / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self.shards):
            file = f"model-{i + 1:05d}-of-{len(self.shards):05d}.safetensors"
            (self.folder / f"shard-{i}").rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index: dict[str, Any] = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
