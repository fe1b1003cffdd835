"""Writes a complete Hugging Face folder: weights, configs, the tokenizer, and the source folder's other files."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.config.run_folder import same_folder, sync
from hft_megatron.conversion.adapter_folder import merged
from hft_megatron.conversion.kept_files import Destination, keep_files
from hft_megatron.conversion.save import Announce, ExportRules, gathered_weights, write_on_rank_0, write_weights
from hft_megatron.data.chat import end_token_ids
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.data.tokenizer_files import TOKENIZER_FILES, VOCABULARY_FILES
from hft_megatron.errors import UserError
from hft_megatron.model.llama import LlamaModel
from hft_megatron.parallel.groups import Placement


def export_folder(
    destination: Destination,
    chunks: Sequence[LlamaModel],
    shape: ModelShape,
    placement: Placement,
    rules: ExportRules,
    tokenizer: Tokenizer | None,
    announce: Announce,
) -> None:
    """Exports this run's model, with its adapters merged, by ``export_tensors`` on rank 0; every rank must call it.

    Raises RunFailed on every rank where rank 0 cannot write; no rank waits for its writing in a collective.
    """
    run_dtype = next(chunks[0].parameters()).dtype
    wholes = merged(gathered_weights(chunks, shape, placement), shape)
    write_on_rank_0(
        lambda: export_tensors(destination, wholes, shape.base, run_dtype, rules, tokenizer, announce),
        wholes,
        placement,
        what=f"the export to {destination.target}",
        caught=(OSError, UserError),
    )


def export_tensors(
    destination: Destination,
    wholes: Iterable[tuple[str, Tensor]],
    shape: ModelShape,
    run_dtype: torch.dtype,
    rules: ExportRules,
    tokenizer: Tokenizer | None,
    announce: Announce,
) -> torch.dtype:
    """Exports to ``destination``, which appears complete or not at all. Returns the data type written.

    ``wholes`` and ``run_dtype`` are those of ``write_weights``. The source's config and generation config are kept,
    with the data type and the begin, end and (where one is named) pad tokens brought in line with what was trained, and
    so are its other files (``keep_files``). Raises OSError where
    that cannot be written.
    """
    unfinished = destination.open()
    try:
        dtype = write_weights(unfinished, wholes, shape, run_dtype, rules, announce)
        _write_configs(unfinished, shape, rules.source, tokenizer, dtype)
        if tokenizer is not None:
            keep = rules.keep_source_tokenizer
            for line in tokenizer.export(unfinished, keep_source=keep, adds_template=rules.adds_template):
                announce(line)
        if rules.source is not None:
            is_of_source = tokenizer is not None and same_folder(tokenizer.facts.source, rules.source)
            others = TOKENIZER_FILES if is_of_source else (*TOKENIZER_FILES, *VOCABULARY_FILES)
            for line in keep_files(Path(rules.source), unfinished, others=others):
                announce(line)
        for path in (*unfinished.rglob("*"), unfinished):
            sync(path)
        lines = destination.publish(unfinished)
    except OSError:
        # A full disk would leave no room to record how the run ended.
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    announce(
        f"exported the model to {destination.target} in Hugging Face's format ({str(dtype).removeprefix('torch.')})"
    )
    for line in lines:
        announce(line)
    return dtype


def _write_configs(
    folder: Path, shape: ModelShape, source: str | None, tokenizer: Tokenizer | None, dtype: torch.dtype
) -> None:
    tokens = {}
    if tokenizer is not None:
        tokens = {"bos_token_id": tokenizer.facts.named_id("bos_token")}
        if tokenizer.facts.names_pad:
            tokens["pad_token_id"] = tokenizer.pad_id
    config = load_hf_config(source) if source is not None else shape.to_hf_config()
    # Both spellings: transformers 4 reads torch_dtype, 5 reads dtype.
    dtype_name = str(dtype).removeprefix("torch.")
    config |= {"torch_dtype": dtype_name, "dtype": dtype_name}
    generation: dict[str, Any] = {}
    if source is not None and (Path(source) / "generation_config.json").exists():
        generation = json.loads((Path(source) / "generation_config.json").read_text(encoding="utf-8"))
    for file, content in (("config.json", config), ("generation_config.json", generation)):
        # A list of end tokens (Llama 3) says more than the tokenizer's single one: its entries stay.
        listed = content.get("eos_token_id")
        content |= tokens
        if tokenizer is not None:
            ends = list(dict.fromkeys([*(listed if isinstance(listed, list) else []), *end_token_ids(tokenizer.facts)]))
            content["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
