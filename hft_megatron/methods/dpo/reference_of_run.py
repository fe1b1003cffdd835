"""The reference model of a run, and the source of its weights."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeVar

import torch

from hft_megatron.checkpoint.folders import identity_of
from hft_megatron.checkpoint.store import load_weights as load_checkpoint_weights
from hft_megatron.checkpoint.verification import shared_digest
from hft_megatron.config.derived import splits_sequences
from hft_megatron.config.run_folder import REFERENCE_FILE, found_again, write_atomically
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.conversion.load import load_weights
from hft_megatron.conversion.save import Announce
from hft_megatron.data.batches import BatchShare
from hft_megatron.data.token_cache import user_cache
from hft_megatron.errors import UserError
from hft_megatron.methods.dpo.data import PreferenceData
from hft_megatron.methods.dpo.reference import (
    Ask,
    CacheKey,
    ModelReference,
    PrecomputedReference,
    SharedReference,
    ask_log_probs,
    check_cache_can_be_written,
    log_prob_table,
    read_cache,
    write_cache,
)
from hft_megatron.model.build import build_model
from hft_megatron.model.llama import LlamaModel
from hft_megatron.parallel.consensus import on_rank_0
from hft_megatron.parallel.groups import Placement
from hft_megatron.trainer.inputs import Inputs
from hft_megatron.trainer.rounds import Rounds
from hft_megatron.trainer.run import Reference

T = TypeVar("T")


def reference_of_run(
    inputs: Inputs,
    chunks: Sequence[LlamaModel],
    rounds: Rounds,
    share: BatchShare,
    placement: Placement,
    announce: Announce,
) -> Reference:
    """The reference of preference tuning; collective.

    ``chunks`` hold the weights that the run started from, before a checkpoint fills them. In a resumed run that
    --finetune started, they are filled here where they are needed. Raises UserError where the reference's weights have
    changed, or its cache cannot be used.
    """
    data, options = inputs.data, inputs.config.dpo
    assert isinstance(data, PreferenceData), "pairs are compared with a reference"
    if options.dpo_reference != "precompute":
        kind, model = options.dpo_reference, options.dpo_reference_model
        return reference_in_memory(kind, model, inputs, chunks, rounds, placement, announce)
    base = None if options.dpo_reference_model is not None else _base(inputs)

    def reference_model() -> Sequence[LlamaModel]:
        if options.dpo_reference_model is None:
            return _with_weights_of_start(inputs, chunks, base)
        return _second_model(options.dpo_reference_model, inputs, chunks, placement)

    digest = base.digest if base is not None else _digest_of_weights(inputs, placement)
    dtype = chunks[0].config.params_dtype
    arithmetic = _arithmetic(inputs, placement) if dtype is torch.bfloat16 else ""
    # The shape has what the weights don't tell, such as the base of the rotary embedding.
    shape = {name: value for name, value in asdict(inputs.shape).items() if name != "adapters"}
    words = json.dumps([digest, shape], sort_keys=True)
    made = _Made(model=sha256(words.encode()).hexdigest(), dtype=str(dtype), arithmetic=arithmetic)
    folder = Path(options.dpo_reference_cache or user_cache("reference", "--dpo-reference-cache"))
    return PrecomputedReference(_table(folder, data, made, reference_model, share, placement, announce))


def reference_in_memory(
    kind: Literal["shared", "model"],
    folder: str | None,
    inputs: Inputs,
    chunks: Sequence[LlamaModel],
    rounds: Rounds,
    placement: Placement,
    announce: Announce,
    ask: Ask = ask_log_probs,
    *,
    adapted: bool = False,
) -> SharedReference | ModelReference:
    """A reference that is evaluated in every step; see ``reference_of_run``, and for ``ask`` the reference itself.

    ``folder`` holds its weights; None for those that the run started from, with its adapters if ``adapted``.
    """
    if folder is None:
        chunks = _with_weights_of_start(inputs, chunks, _base(inputs))
    if kind == "shared":
        kept = "the policy's frozen weights, and a copy of each unit that trains"
        if inputs.shape.adapters is not None and not adapted:
            kept = "the policy without its adapters"
        announce(f"> reference: {kept}")
        return SharedReference(chunks, _trained_so_far(inputs, rounds), ask, adapted=adapted)
    announce(f"> reference: a second model, {folder or 'with the weights of the start'}")
    return ModelReference(_second_model(folder, inputs, chunks, placement), ask, adapted=adapted)


def _base(inputs: Inputs) -> "_Base | None":
    """The checkpoint that --finetune took the run's first weights from; collective."""
    return None if inputs.identity.finetuned_from is None else on_rank_0(lambda: _base_of_finetuning(inputs))


def _with_weights_of_start(inputs: Inputs, chunks: Sequence[LlamaModel], base: "_Base | None") -> Sequence[LlamaModel]:
    """``chunks``, filled where they don't hold the weights that the run started from; collective."""
    if base is not None and inputs.resumes:
        on_rank_0(lambda: _check_base(inputs, base))
        load_checkpoint_weights(base.checkpoint, chunks)
    return chunks


@dataclass(frozen=True, kw_only=True)
class _Made:
    """Origin of a cache's numbers; see ``CacheKey``."""

    model: str
    dtype: str
    arithmetic: str


def _arithmetic(inputs: Inputs, placement: Placement) -> str:
    """Settings that change the order of sums. In fp32 the effect is below 1e-5, and numbers of one layout serve any
    other. In bf16 it changes an answer's log-probability by whole units, and margins that should be 0 with it.
    """
    config = inputs.config
    engine = "torch" if config.training.transformer_impl == "local" else "transformer-engine"
    sequence = ", SP" if splits_sequences(config.parallel) else ""
    packing = ", packed" if config.data.packing else ""
    return f"{placement.device.type}, {engine}, TP {placement.tensor_size}{sequence}{packing}"


@dataclass(frozen=True, kw_only=True)
class _Base:
    """A checkpoint of another run that this one started from."""

    checkpoint: Path
    digest: str


def _base_of_finetuning(inputs: Inputs) -> _Base:
    """The start weights of a run that --finetune started. Noted in --save at the start, and read on every resume."""
    assert inputs.checkpoint is not None
    if not inputs.resumes:
        base = _Base(checkpoint=inputs.checkpoint.resolve(), digest=identity_of(inputs.checkpoint))
    else:
        note = inputs.checkpoint.with_name(REFERENCE_FILE)
        try:
            noted = json.loads(note.read_text(encoding="utf-8"))
            checkpoint = Path(noted["checkpoint"])
            run = found_again(checkpoint.parent, beside=note.parent)
            base = _Base(checkpoint=run / checkpoint.name, digest=str(noted["digest"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--load {note.parent}: {note.name}, which names the checkpoint that the run started from, "
                f"cannot be read ({error}); copy the run's folder again."
            ) from error
    if inputs.config.checkpoint.save is not None:
        folder = Path(inputs.config.checkpoint.save)
        noted = {"checkpoint": str(base.checkpoint), "digest": base.digest}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / REFERENCE_FILE, json.dumps(noted, indent=1) + "\n")
        except OSError as error:
            raise UserError(
                f"--save {folder} cannot be written: {error}; free some space, or choose another folder."
            ) from error
    return base


def _check_base(inputs: Inputs, base: _Base) -> None:
    run = f"--load {inputs.config.checkpoint.load}"
    try:
        found = identity_of(base.checkpoint)
    except OSError as error:
        raise UserError(
            f"{run}: {base.checkpoint}, the checkpoint that this run started from and compares with, cannot be read "
            f"({error.strerror}); put it back."
        ) from error
    if found != base.digest:
        raise UserError(
            f"{run}: {base.checkpoint}, which this run started from and compares with, has changed "
            f"(sha256 {found[:12]} instead of {base.digest[:12]}); put the original back."
        )


def _trained_so_far(inputs: Inputs, rounds: Rounds) -> frozenset[str]:
    """Units that this run's own rounds have trained: those of a run before it trained the reference's weights."""
    if not inputs.resumes:
        return frozenset()
    own = range(rounds.schedule.first_round, inputs.position.round + 1)
    return frozenset[str]().union(*(rounds.plan(round).training for round in own))


def _digest_of_weights(inputs: Inputs, placement: Placement) -> str:
    """Digest of the reference's folder, or of the weights that the run started from."""
    folder = inputs.config.dpo.dpo_reference_model or inputs.config.model.load_hf
    if folder is not None:
        return _digest_of_folder(folder, placement)
    return f"random, seed {inputs.config.training.seed}"


def _digest_of_folder(folder: str, placement: Placement) -> str:
    with HuggingFaceWeights(folder) as weights:
        return shared_digest(weights.files(), placement)


def _second_model(
    folder: str | None, inputs: Inputs, chunks: Sequence[LlamaModel], placement: Placement
) -> list[LlamaModel]:
    """A model of the same layout, with the folder's weights or those of ``chunks``."""
    config = inputs.config
    second = build_model(
        inputs.shape if folder is None else inputs.shape.base,
        config.parallel,
        config.training,
        placement=placement,
        dtype=chunks[0].config.params_dtype,
        vocab_multiple=config.model.make_vocab_size_divisible_by,
    )
    if folder is not None:
        load_weights(folder, second, inputs.shape, placement, option="--dpo-reference-model")
    else:
        for copy, chunk in zip(second, chunks, strict=True):
            copy.load_state_dict(chunk.state_dict())
    for copy in second:
        copy.requires_grad_(False)
    return second


def _table(
    folder: Path,
    data: PreferenceData,
    made: _Made,
    reference_model: Callable[[], Sequence[LlamaModel]],
    share: BatchShare,
    placement: Placement,
    announce: Announce,
) -> torch.Tensor:
    """Log-probabilities of all pairs, validation after training. The model is built at most once, and not at all where
    all are in the cache."""
    reference = None
    tables = []
    for dataset, batches in data.passes(share):
        key = CacheKey(**asdict(made), data=dataset.digest, pairs=len(dataset))
        table = _cached(folder, key, announce)
        if table is None:
            on_rank_0(lambda: _written(folder, lambda: check_cache_can_be_written(folder)))
            begun = _cached(folder, key, announce, part=True)
            keep_part = partial(_keep, folder, key, part=True)
            reference = reference_model() if reference is None else reference
            table = log_prob_table(
                reference, batches, len(dataset), placement, announce, begun=begun, keep_part=keep_part
            )
            announce(f"> reference: log-probabilities kept in {_keep(folder, key, table, part=False)}")
        tables.append(table)
    return torch.cat(tables)


def _cached(folder: Path, key: CacheKey, announce: Announce, *, part: bool = False) -> torch.Tensor | None:
    """The table that rank 0 finds on its disk, on every rank; a damaged file counts as none, and is named."""
    answer = on_rank_0(lambda: read_cache(folder, key, part=part))
    if isinstance(answer, str):
        announce(f"> reference: {answer}; computing it again")
        return None
    if answer is not None:
        found = key.pairs - int(answer[:, 0].isnan().sum())
        announce(f"> reference: log-probabilities of {found} pairs from {folder / key.file_name(part=part)}")
    return answer


def _keep(folder: Path, key: CacheKey, table: torch.Tensor, *, part: bool) -> Path:
    return on_rank_0(lambda: _written(folder, lambda: write_cache(folder, key, table, part=part)))


def _written(folder: Path, write: Callable[[], T]) -> T:
    try:
        return write()
    except OSError as error:
        raise UserError(
            f"--dpo-reference-cache {folder} cannot be written ({error.strerror}); name another folder."
        ) from error
