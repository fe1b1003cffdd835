"""Refuses a ``config.json`` that asks for what this project's model does not compute, and names what it can't judge.

The keys and their values are those of the table in ``hf_keys``; here are the rules that need more than one value.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hft_megatron.config.hf_keys import HF_KEYS, unknown_keys
from hft_megatron.errors import UserError

ARCHITECTURES = {"llama": ("LlamaForCausalLM", "LLaMAForCausalLM"), "mistral": ("MistralForCausalLM",)}
"""``model_type`` and the classes of that kind; the second spelling is in early exports of LLaMA 1."""

MISTRAL_WINDOW = 4096
"""``sliding_window`` of a Mistral whose config.json does not name it, by transformers' MistralConfig."""


def refuse_other_models(config: Mapping[str, Any], source: str) -> None:
    """Raise UserError naming the key of a ``config.json`` that asks for something else than a LLaMA.

    ``source`` is how errors call the file. Mistral is a LLaMA where its sliding window is off.
    """
    _refuse_other_architectures(config, source)
    for row in HF_KEYS:
        for key in row.names if row.treatment == "refused" else ():
            if config.get(key, row.neutral[0]) not in row.neutral:
                shown = "a quantized model" if row.meaning.startswith("quantised") else f"{key} = {config[key]!r}"
                raise UserError(
                    f"{source}: {shown} is not supported ({row.meaning}); only {key} = {row.neutral[0]!r} is."
                )
    _refuse_windows(config, source)


def _refuse_other_architectures(config: Mapping[str, Any], source: str) -> None:
    model_type, classes = config.get("model_type"), config.get("architectures")
    known = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if known is None:
        shown = f" ({classes[0]})" if isinstance(classes, list) and classes else ""
        raise UserError(
            f"{source}: model_type is {model_type!r}{shown}, and only 'llama' and 'mistral' models can be trained."
        )
    if classes and not (isinstance(classes, list) and any(name in known for name in classes)):
        raise UserError(
            f"{source}: architectures is {classes!r}, and of {model_type!r} only {known[0]} can be trained."
        )
    own_code = config.get("auto_map")
    if isinstance(own_code, Mapping) and any(name.startswith("AutoModel") for name in own_code):
        raise UserError(
            f"{source}: auto_map says that the folder's own code computes this model, and such code is never run; "
            "use an export whose weights are those of transformers' LLaMA."
        )


def _refuse_windows(config: Mapping[str, Any], source: str) -> None:
    """Attention to everything before is what is built: no window, in no layer."""
    is_mistral = config["model_type"] == "mistral"
    window = config.get("sliding_window", MISTRAL_WINDOW if is_mistral else None)
    # Only Mistral's code lacks the switch: there the window is on whenever it has a size.
    switched_off = config.get("use_sliding_window") is False and not is_mistral
    if window is not None and not switched_off:
        absent = "" if "sliding_window" in config else " (what Mistral has when the key is absent)"
        raise UserError(
            f"{source}: sliding_window = {window!r}{absent} is not supported; only sliding_window = None is."
        )
    for layer, kind in enumerate(config.get("layer_types") or ()):
        if kind != "full_attention":
            raise UserError(
                f"{source}: layer_types has {kind!r} in layer {layer}, which is not supported; "
                "only 'full_attention' is."
            )


def note_unknown_keys(config: Mapping[str, Any], source: str) -> list[str]:
    """A line for the log where a ``config.json`` has keys that this project doesn't know, else nothing."""
    unknown = unknown_keys(config)
    if not unknown:
        return []
    return [f"{source}: keys that are not known and not read: {', '.join(unknown)} (a LLaMA is computed without them)"]
