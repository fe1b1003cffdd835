"""Hugging Face folder -> this rank's parameters, each rank reading only its own slices."""

import hashlib
from collections.abc import Sequence

import torch

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.errors import UserError
from hft_megatron.hft.units import EMBEDDING_NAME, LM_HEAD_NAME, units_of
from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.parameter_names import whole_shape
from hft_megatron.model.parameters import ParameterSlot, local_range, parameter_slots
from hft_megatron.parallel.consensus import together
from hft_megatron.parallel.groups import Placement

_HARMLESS = ".rotary_emb.inv_freq"
"""Rotary frequencies, which old exports hold and which follow from config.json."""
_QUANTIZED = (".qweight", ".qzeros", ".scales", ".g_idx", "weight_scale", "weight_packed", "quant_state", ".SCB")
"""Parts of names in files of GPTQ, AWQ, compressed-tensors and bitsandbytes."""
_ROWS_AT_ONCE = 4096


def check_weights(folder: str, shape: ModelShape, *, option: str = "--load-hf") -> str:
    """Raises UserError unless ``folder`` holds the model's tensors, and no others, in supported shapes and types.

    Files of two exports are an error too (``HuggingFaceWeights``). Returns a sha256 over the first entries of every
    tensor, which tells models of one shape apart. Reads only the files' headers and those entries, so that an error is
    found before a model is built.
    """
    digest = hashlib.sha256()
    with HuggingFaceWeights(folder, option=option) as weights:
        for unit in units_of(shape.base):
            name = f"{unit.name}.weight"
            weights.check_shape(name, whole_shape(unit.name, shape))
            first = weights.read(name, dim=0, start=0, length=1)
            digest.update(f"{name} {first.dtype}".encode() + first.float().numpy().tobytes())
        weights.check_one_export()
        _check_no_others(weights, shape)
    return digest.hexdigest()


def _check_no_others(weights: HuggingFaceWeights, shape: ModelShape) -> None:
    """Raises UserError for a tensor that nothing reads: without it the model would silently compute something else."""
    expected = {f"{unit.name}.weight" for unit in units_of(shape.base)}
    for name in weights.names():
        if name in expected or name.endswith(_HARMLESS):
            continue
        if shape.tie_embeddings and name == f"{LM_HEAD_NAME}.weight":
            _check_tied_head(weights, shape)
            continue
        reason = "this model has no biases" if name.endswith(".bias") else "config.json describes no such tensor"
        if any(part in name for part in _QUANTIZED):
            reason = "quantized weights are not read; dequantize the model first"
        raise UserError(
            f"{weights.option} {weights.folder}: there is a tensor {name} in {weights.file(name)}, but {reason}."
        )


def _check_tied_head(weights: HuggingFaceWeights, shape: ModelShape) -> None:
    """Raises UserError where an export holds the tied matrix twice and the copies differ; equal ones are harmless."""
    head, embedding = f"{LM_HEAD_NAME}.weight", f"{EMBEDDING_NAME}.weight"
    weights.check_shape(head, whole_shape(LM_HEAD_NAME, shape))
    for start in range(0, shape.vocab_size, _ROWS_AT_ONCE):
        rows = min(_ROWS_AT_ONCE, shape.vocab_size - start)
        first, second = (weights.read(name, dim=0, start=start, length=rows) for name in (embedding, head))
        if not torch.equal(first.float(), second.float()):
            raise UserError(
                f"{weights.option} {weights.folder}: config.json ties the head to the embedding (tie_word_embeddings), "
                f"but {head} and {embedding} differ; set tie_word_embeddings to false, or remove {head}."
            )


def load_weights(
    folder: str,
    chunks: Sequence[LlamaModel],
    shape: ModelShape,
    placement: Placement,
    *,
    option: str = "--load-hf",
) -> None:
    """Fills every parameter of this rank from safetensors, rounding to the parameter's dtype where it is coarser.

    Adapters, which no such folder has, are left as they are. Rows that only pad the vocabulary become zero. Collective.
    Raises UserError on all ranks, with the message of the first rank that has one, for a missing or misshapen tensor
    and for a value that is not finite.
    """

    def fill() -> None:
        with HuggingFaceWeights(folder, option=option) as weights:
            for slot in parameter_slots(chunks):
                if slot.is_adapter:
                    continue
                weights.check_shape(slot.hf_name, whole_shape(slot.unit, shape))
                with torch.no_grad():
                    _fill(slot, weights, shape, placement)

    together(fill)


def _fill(slot: ParameterSlot, weights: HuggingFaceWeights, shape: ModelShape, placement: Placement) -> None:
    if slot.cut is None:
        slot.parameter.copy_(weights.read(slot.hf_name))
        return
    start, real = local_range(slot, whole_shape(slot.unit, shape)[slot.cut], placement)
    slot.parameter.zero_()
    if real > 0:
        part = weights.read(slot.hf_name, dim=slot.cut, start=start, length=real)
        slot.parameter.narrow(slot.cut, 0, real).copy_(part)
