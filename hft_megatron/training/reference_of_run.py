"""Which reference model a run compares with, and where its weights come from."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
import torch.distributed as dist

from hft_megatron.checkpoint.digests import identity_of
from hft_megatron.checkpoint.store import load_weights as load_checkpoint_weights
from hft_megatron.checkpoint.verification import shared_digest
from hft_megatron.config.run_folder import REFERENCE_FILE, write_atomically
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.conversion.load import load_weights
from hft_megatron.conversion.save import Announce
from hft_megatron.data.batches import BatchShare
from hft_megatron.errors import UserError
from hft_megatron.model.build import build_model
from hft_megatron.model.llama import LlamaModel
from hft_megatron.parallel.groups import Placement
from hft_megatron.training.inputs import Inputs
from hft_megatron.training.preference_data import PreferenceData
from hft_megatron.training.reference import (
    ModelReference,
    PrecomputedReference,
    SharedReference,
    log_prob_table,
)
from hft_megatron.training.reference_cache import CacheKey, default_cache, read_cache, write_cache
from hft_megatron.training.rounds import Rounds
from hft_megatron.training.run import Reference


def reference_of_run(
    inputs: Inputs,
    chunks: Sequence[LlamaModel],
    rounds: Rounds,
    share: BatchShare,
    placement: Placement,
    announce: Announce,
) -> Reference | None:
    """The reference of preference tuning, None for other methods; collective.

    ``chunks`` hold the weights that the run started from, before a checkpoint fills them, except in a run that
    --finetune started and that goes on: then they are filled here. Raises UserError where the reference's weights are
    not what they were, or its cache can't be used.
    """
    data, options = inputs.data, inputs.config.dpo
    if not isinstance(data, PreferenceData):
        return None
    model = _start_of_run(inputs, chunks, placement)
    if options.dpo_reference == "shared":
        trained = rounds.trained_until(inputs.position.round) if inputs.resumes else frozenset()
        announce("> reference: the policy's resting weights, and a copy of each unit that trains")
        return SharedReference(chunks, trained)
    if options.dpo_reference == "model":
        announce(f"> reference: a second model, {options.dpo_reference_model or 'with the weights of the start'}")
        return ModelReference(_second_model(inputs, chunks, placement))
    if options.dpo_reference_model is not None:
        model = _digest_of_folder(options.dpo_reference_model, placement)
    return PrecomputedReference(_table(inputs, data, model, chunks, share, placement, announce))


def _start_of_run(inputs: Inputs, chunks: Sequence[LlamaModel], placement: Placement) -> str:
    """Has the model hold the weights that the run started from; their digest."""
    config = inputs.config
    if inputs.identity.finetuned_from is not None:
        checkpoint, digest = _base_of_finetuning(inputs, placement)
        if inputs.resumes:
            load_checkpoint_weights(checkpoint, chunks)
        return digest
    if config.model.load_hf is not None:
        return _digest_of_folder(config.model.load_hf, placement)
    words = json.dumps([asdict(inputs.shape), config.training.seed], sort_keys=True)
    return f"random {sha256(words.encode()).hexdigest()}"


def _base_of_finetuning(inputs: Inputs, placement: Placement) -> tuple[Path, str]:
    """The checkpoint of another run that this one started from, and its digest. Noted in --save at the start."""
    if not inputs.resumes:
        assert inputs.checkpoint is not None
        digest = identity_of(inputs.checkpoint)
        _note_base(inputs, inputs.checkpoint.resolve(), digest, placement)
        return inputs.checkpoint, digest
    assert inputs.checkpoint is not None
    note = inputs.checkpoint.with_name(REFERENCE_FILE)
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        checkpoint, digest = Path(noted["checkpoint"]), str(noted["digest"])
        found = identity_of(checkpoint)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--load {note.parent}: the checkpoint that this run started from, which is its reference, can't be read "
            f"({error}); put it back, or give its weights as --dpo-reference-model."
        ) from error
    if found != digest:
        raise UserError(
            f"--load {note.parent}: {checkpoint}, which this run started from and compares with, is not what it was "
            f"(sha256 {found[:12]} instead of {digest[:12]}); put the right one back."
        )
    return checkpoint, digest


def _note_base(inputs: Inputs, checkpoint: Path, digest: str, placement: Placement) -> None:
    if inputs.config.checkpoint.save is None or placement.rank != 0:
        return
    folder = Path(inputs.config.checkpoint.save)
    folder.mkdir(parents=True, exist_ok=True)
    noted = {"checkpoint": str(checkpoint), "digest": digest}
    write_atomically(folder / REFERENCE_FILE, json.dumps(noted, indent=1) + "\n")


def _digest_of_folder(folder: str, placement: Placement) -> str:
    with HuggingFaceWeights(folder) as weights:
        return shared_digest(weights.files(), placement)


def _second_model(inputs: Inputs, chunks: Sequence[LlamaModel], placement: Placement) -> list[LlamaModel]:
    """Of the same layout, with the folder's weights or those that ``chunks`` hold."""
    config, folder = inputs.config, inputs.config.dpo.dpo_reference_model
    second = build_model(
        inputs.shape,
        config.parallel,
        config.training,
        placement=placement,
        dtype=chunks[0].config.params_dtype,
        vocab_multiple=config.model.make_vocab_size_divisible_by,
    )
    if folder is not None:
        load_weights(folder, second, inputs.shape, placement)
    else:
        for copy, chunk in zip(second, chunks, strict=True):
            copy.load_state_dict(chunk.state_dict())
    for copy in second:
        copy.requires_grad_(False)
    return second


def _table(
    inputs: Inputs,
    data: PreferenceData,
    model: str,
    chunks: Sequence[LlamaModel],
    share: BatchShare,
    placement: Placement,
    announce: Announce,
) -> torch.Tensor:
    """Log-probabilities of all pairs, those of validation behind those of training."""
    options = inputs.config.dpo
    reference = None if options.dpo_reference_model is not None else chunks
    folder = Path(options.dpo_reference_cache or default_cache())
    tables = []
    for dataset, batches in data.passes(share):
        key = CacheKey(model=model, data=dataset.digest, dtype=str(chunks[0].config.params_dtype), pairs=len(dataset))
        table = _cached(folder, key, placement, announce)
        if table is None:
            if reference is None:
                reference = _second_model(inputs, chunks, placement)
            table = log_prob_table(reference, batches, len(dataset), placement, announce)
            _keep(folder, key, table, placement, announce)
        tables.append(table)
    return torch.cat(tables)


def _cached(folder: Path, key: CacheKey, placement: Placement, announce: Announce) -> torch.Tensor | None:
    """What rank 0 finds on its disk, on every rank; a damaged file counts as none, and is named."""
    answers: list[object] = [None]
    if placement.rank == 0:
        try:
            answers = [read_cache(folder, key)]
        except UserError as error:
            answers = [error]
    dist.broadcast_object_list(answers, src=0)
    [answer] = answers
    if isinstance(answer, UserError):
        raise answer
    if isinstance(answer, str):
        announce(f"> reference: {answer}: making it again")
        return None
    if answer is not None:
        announce(f"> reference: log-probabilities of {key.pairs} pairs from {folder / key.file_name}")
    assert answer is None or isinstance(answer, torch.Tensor)
    return answer


def _keep(folder: Path, key: CacheKey, table: torch.Tensor, placement: Placement, announce: Announce) -> None:
    mistakes: list[str | None] = [None]
    if placement.rank == 0:
        try:
            write_cache(folder, key, table)
        except OSError as error:
            mistakes = [f"--dpo-reference-cache {folder} can't be written ({error}); name another folder."]
    dist.broadcast_object_list(mistakes, src=0)
    if mistakes[0] is not None:
        raise UserError(mistakes[0])
    announce(f"> reference: log-probabilities kept in {folder / key.file_name}")
