"""Adapters in PEFT's format, in a folder of two files, and added to the matrices that they belong to.

PEFT gives a tensor that it does not find the value of a new adapter's, which does nothing, and only warns. Names are
therefore compared in full here.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from hft_megatron.config.adapters import ADAPTER_PARTS, Adapters, has_adapter
from hft_megatron.config.file_digest import file_digest
from hft_megatron.config.lora import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, AdapterNote
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.run_folder import sync
from hft_megatron.conversion.kept_files import NewFolder
from hft_megatron.conversion.save import Announce, gathered_weights, write_on_rank_0
from hft_megatron.errors import UserError
from hft_megatron.hft.units import units_of
from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.parameter_names import whole_shape
from hft_megatron.model.parameters import local_slice, parameter_slots
from hft_megatron.parallel.consensus import together
from hft_megatron.parallel.groups import Placement

_A, _B = ADAPTER_PARTS


def peft_name(unit: str) -> str:
    """The name that PEFT's file has for the weight of an adapter's unit."""
    return f"base_model.model.{unit}.weight"


def _peft_config(adapters: Adapters, base: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapters.rank,
        "lora_alpha": int(adapters.alpha) if adapters.alpha.is_integer() else adapters.alpha,
        "lora_dropout": adapters.dropout,
        "target_modules": list(adapters.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }


def export_adapter(
    destination: NewFolder,
    chunks: Sequence[LlamaModel],
    shape: ModelShape,
    placement: Placement,
    *,
    base: str | None,
    announce: Announce,
    values: Mapping[Parameter, Tensor],
    note: AdapterNote | None,
) -> None:
    """Writes the adapters of this run's model; the folder appears complete or not at all. Every rank must call it.

    ``base`` is the Hugging Face folder of the model that they belong to. ``values`` are those of
    ``gathered_weights``. Raises RunFailed on every rank where rank 0 cannot write.
    """
    adapters = shape.adapters
    assert adapters is not None
    config = _peft_config(adapters, base)
    wholes = gathered_weights(chunks, shape, placement, only_adapters=True, values=values)
    write_on_rank_0(
        lambda: _write(destination, {peft_name(unit): whole.contiguous() for unit, whole in wholes}, config, note),
        wholes,
        placement,
        what=f"the adapter in {destination.target}",
        caught=(OSError, SafetensorError),
    )
    announce(f"exported the adapter to {destination.target} in PEFT's format")


def _write(
    destination: NewFolder, tensors: dict[str, Tensor], config: dict[str, Any], note: AdapterNote | None
) -> None:
    unfinished = destination.open()
    try:
        save_file(tensors, unfinished / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
        (unfinished / ADAPTER_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if note is not None:
            note.write(unfinished)
        for path in (*unfinished.iterdir(), unfinished):
            sync(path)
        destination.publish(unfinished)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def check_adapter(folder: str, shape: ModelShape) -> str:
    """Checks that ``folder`` holds finite adapters of these shapes for the matrices of the model, no other tensors, and
    at least one that does something. Raises UserError otherwise. Returns the sha256 of its file."""
    wanted = {peft_name(unit.name): unit.name for unit in units_of(shape) if unit.category == "adapter"}
    does_something = False
    with _opened(folder) as file:
        held = set(file.keys())
        odd = min(held ^ wanted.keys(), default=None)
        if odd is not None:
            why = "is missing" if odd in wanted else "belongs to no matrix among the target modules of this model"
            raise UserError(
                f"--lora-adapter {folder}: tensor {odd} {why}; use an adapter of this model, saved by PEFT under its "
                f"own names."
            )
        for name, unit in wanted.items():
            tensor: Tensor = file.get_tensor(name)
            if tuple(tensor.shape) != whole_shape(unit, shape):
                raise UserError(
                    f"--lora-adapter {folder}: {name} has shape {list(tensor.shape)}, but the model needs "
                    f"{list(whole_shape(unit, shape))}."
                )
            if not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
                raise UserError(f"--lora-adapter {folder}: {name} holds values that are not finite.")
            does_something |= unit.endswith(_B) and bool(tensor.any())
    if not does_something:
        raise UserError(
            f"--lora-adapter {folder}: every lora_B is 0, so the adapter does nothing; use a trained adapter, or start "
            f"a new one with --lora-rank."
        )
    return file_digest(Path(folder) / ADAPTER_WEIGHTS_FILE)


def adapter_values(folder: str, chunks: Sequence[LlamaModel], placement: Placement) -> dict[Parameter, Tensor]:
    """This rank's part of every adapter in a folder that ``check_adapter`` accepts, fp32 in host memory."""
    with _opened(folder) as file:
        return {
            slot.parameter: local_slice(file.get_tensor(peft_name(slot.unit)), slot, placement).float()
            for slot in parameter_slots(chunks)
            if slot.is_adapter
        }


def load_adapter(folder: str, chunks: Sequence[LlamaModel], placement: Placement) -> None:
    """Fills this rank's adapters from a folder that ``check_adapter`` accepts; collective."""

    def fill() -> None:
        with torch.no_grad():
            for parameter, value in adapter_values(folder, chunks, placement).items():
                parameter.copy_(value)

    together(fill)


def _opened(folder: str) -> Any:
    try:
        return safe_open(Path(folder) / ADAPTER_WEIGHTS_FILE, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--lora-adapter {folder}: {ADAPTER_WEIGHTS_FILE} cannot be read ({error}); copy the folder again."
        ) from error


def merged(wholes: Iterable[tuple[str, Tensor]], shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Yields (unit, whole tensor) in the order of ``units_of``, with adapters added to their matrices in fp32."""
    held: list[Tensor] = []
    name = ""
    for unit, whole in wholes:
        if unit.endswith(ADAPTER_PARTS):
            assert unit == f"{name}.{ADAPTER_PARTS[len(held) - 1]}", "an adapter follows its matrix"
        else:
            name = unit
        held.append(whole)
        if has_adapter(name, shape.adapters) and len(held) < 1 + len(ADAPTER_PARTS):
            continue
        assert shape.adapters is not None or len(held) == 1
        yield name, _sum(held, shape.adapters)
        held = []


def merged_reader(read: Callable[[str], Tensor], shape: ModelShape) -> Callable[[str], Tensor]:
    """Wraps ``read``, which gives any unit's weight, for the units of the model without adapters: each with its adapter
    added to it, in fp32."""

    def read_sum(unit: str) -> Tensor:
        parts = [f"{unit}.{part}" for part in ADAPTER_PARTS] if has_adapter(unit, shape.adapters) else []
        return _sum([read(name) for name in (unit, *parts)], shape.adapters)

    return read_sum


def _sum(held: Sequence[Tensor], adapters: Adapters | None) -> Tensor:
    weight, *factors = held
    if not factors:
        return weight
    assert adapters is not None
    first, second = factors
    return torch.addmm(weight.float(), second.float(), first.float(), alpha=adapters.scale)
