"""The fp32 values of adapters: read from --lora-adapter into masters, and written from these to --save-lora."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.nn import Parameter

from hft_megatron.config.exports import run_in
from hft_megatron.config.lora import AdapterNote
from hft_megatron.conversion.adapter_folder import adapter_values, export_adapter
from hft_megatron.conversion.kept_files import NewFolder
from hft_megatron.conversion.save import Announce
from hft_megatron.model.llama import LlamaModel
from hft_megatron.optimizer.carried import whole_masters
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.parallel.consensus import on_rank_0
from hft_megatron.parallel.groups import Placement
from hft_megatron.trainer.inputs import Inputs


def fill_masters(folder: str, wrapped: WrappedModel, placement: Placement) -> None:
    """Fills fp32 masters from --lora-adapter, whose values bf16 weights hold rounded; collective."""
    if "param" not in wrapped.shards.state_names:
        return
    for parameter, value in adapter_values(folder, wrapped.modules, placement).items():
        wrapped.shards.set_shard(parameter, {"param": value.flatten()})


def save_adapter(
    target: Path,
    inputs: Inputs,
    chunks: Sequence[LlamaModel],
    iteration: int,
    wrapped: WrappedModel | None,
    placement: Placement,
    announce: Announce,
) -> None:
    """Writes --save-lora, under bf16 from fp32 masters; not again when a complete run is started again. Collective.

    ``wrapped`` is None where nothing trains; then the values come from --lora-adapter, or from the weights.
    """
    run = on_rank_0(lambda: run_in(inputs.config.checkpoint.save))
    note = None if run is None else AdapterNote(run=run, iteration=iteration)
    if note is not None and on_rank_0(lambda: AdapterNote.read(target)) == note:
        announce(f"> --save-lora {target} already holds the adapter of iteration {iteration}")
        return
    folder, values = inputs.config.lora.lora_adapter, dict[Parameter, Tensor]()
    if inputs.config.training.bf16:
        if wrapped is not None:
            values = whole_masters(wrapped.shards, wrapped.training_slots, placement.groups.dp)
        elif folder is not None:
            values = adapter_values(folder, chunks, placement)
        else:
            announce(f"> --save-lora {target} is written in bf16: this command has no fp32 values of the adapters")
    export_adapter(
        NewFolder(target=target),
        chunks,
        inputs.shape,
        placement,
        base=inputs.config.model.load_hf,
        announce=announce,
        values=values,
        note=note,
    )
