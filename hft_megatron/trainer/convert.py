"""Conversion without a run: a checkpoint to a Hugging Face folder in one process, and the check of logits."""

from dataclasses import replace
from pathlib import Path

import torch

from hft_megatron.checkpoint.saved_run import SavedRun
from hft_megatron.checkpoint.store import PLAN_FILE, check_saved_plan
from hft_megatron.checkpoint.tensors import CheckpointTensors
from hft_megatron.config.adapters import adapted_unit
from hft_megatron.config.model import heads_fit_the_model
from hft_megatron.config.model_shape import HF_CONFIG_FILE, ModelShape, load_hf_config
from hft_megatron.config.names import SELECTIONS
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import SPECTRUM_FILE
from hft_megatron.conversion.adapter_folder import merged_reader
from hft_megatron.conversion.export import export_tensors
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.conversion.kept_files import NewFolder
from hft_megatron.conversion.load import check_weights
from hft_megatron.conversion.logits_check import LogitDifference, compare_logits
from hft_megatron.conversion.save import Announce, ExportRules
from hft_megatron.conversion.weight_files import notes_on_folder
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import RunFailed
from hft_megatron.hft.plan import Plan
from hft_megatron.hft.plan_file import load_plans
from hft_megatron.hft.units import units_of
from hft_megatron.trainer.inputs import read_scores
from hft_megatron.trainer.rounds import Rounds, rounds_of_run


def convert_checkpoint(
    load: str,
    iteration: int | None,
    save_hf: str,
    *,
    save_dtype: str | None,
    check: bool,
    announce: Announce,
) -> None:
    """Exports a checkpoint of the run in ``load`` to the new folder ``save_hf``, tensor by tensor.

    The result equals the run's own --save-hf export. Where the folder that the run started from is gone, the weights
    are written as the checkpoint has them, and the log says so. With ``check`` the logits of both are compared. Raises
    UserError for a folder that cannot be read, RunFailed when the logits differ.
    """
    run = SavedRun.read(load, iteration)
    shape, source = run.identity.shape, run.source()
    tensors = CheckpointTensors(run.checkpoint, shape, option=run.option)
    announce(
        f"> {run.checkpoint}: a LLaMA of {shape.parameter_count():,} parameters at iteration {run.state.iteration}"
    )
    if source is None:
        announce(_without_source(run, tensors.dtype))
    rules = ExportRules(
        source=source,
        trained=units_trained(run),
        adds_template=run.identity.uses_chat_template or run.config.data.chat_template is not None,
        save_dtype=None if save_dtype is None else getattr(torch, save_dtype),
        keep_source_tokenizer=run.config.checkpoint.keep_source_tokenizer,
    )
    with tensors.on(source) as read_as_saved:
        read, base = merged_reader(read_as_saved, shape), shape.base
        wholes = ((unit.name, read(unit.name)) for unit in units_of(base))
        written = export_tensors(
            NewFolder(target=Path(save_hf)), wholes, base, tensors.dtype, rules, _tokenizer(run, announce), announce
        )
        if check:
            rounded_to = _coarsest_rounding(tensors.dtype, written, has_source=source is not None)
            if shape.adapters is not None:
                # A matrix with its adapter added to it is in fp32 until it is written.
                rounded_to = max(rounded_to, written, key=lambda dtype: torch.finfo(dtype).eps)
            _compare(save_hf, compare_logits(save_hf, base, read, rounded_to=rounded_to), announce)


def check_model_folder(load_hf: str, announce: Announce) -> None:
    """Compares the logits that this project and transformers compute from one Hugging Face folder.

    Raises UserError for a folder that cannot be trained, RunFailed when the logits differ.
    """
    shape = ModelShape.from_hf_config(load_hf_config(load_hf), source=f"{load_hf}/{HF_CONFIG_FILE}")
    heads_fit_the_model(RunConfig(), shape, 1)
    check_weights(load_hf, shape)
    for note in notes_on_folder(load_hf):
        announce(f"> {note}")
    with HuggingFaceWeights(load_hf) as weights:
        difference = compare_logits(
            load_hf, shape, lambda unit: weights.read(f"{unit}.weight"), rounded_to=torch.float32
        )
    _compare(load_hf, difference, announce)


def units_trained(run: SavedRun) -> frozenset[str]:
    """Units that the run may have changed until this checkpoint, units with an adapter through its training.

    UserError when the options (a plan file, scores) no longer give the checkpoint's own plan.
    """
    shape = run.identity.shape
    file = run.checkpoint / PLAN_FILE
    if run.state.round == 0:
        trained = Plan.from_json(file.read_text(encoding="utf-8"), shape=shape, source=str(file)).training
        return frozenset(adapted_unit(unit) or unit for unit in trained)
    rounds = rounds_of_saved(Path(run.folder), run.config, shape)
    trained = rounds.trained_until(run.state.round)
    check_saved_plan(run.checkpoint, rounds.plan(run.state.round), shape)
    return frozenset(adapted_unit(unit) or unit for unit in trained)


def rounds_of_saved(folder: Path, config: RunConfig, shape: ModelShape) -> Rounds:
    """The plans of the rounds of the run in ``folder``, as its (resolved) options and files give them, without their
    lengths."""
    hft = config.hft
    needs_scores = SELECTIONS[hft.hft_selection].needs_scores
    return rounds_of_run(
        # Without iterations, as in any conversion: lengths of rounds, which may depend on epochs, are not needed.
        replace(config, training=replace(config.training, train_iters=0)),
        shape,
        world_size=1,
        samples=None,
        loaded=() if hft.hft_plan is None else load_plans(hft.hft_plan, shape),
        scores=read_scores(folder / SPECTRUM_FILE, shape) if needs_scores else None,
    )


def _without_source(run: SavedRun, dtype: torch.dtype) -> str:
    started_from = run.config.model.load_hf
    why = "the run started from random weights" if started_from is None else f"--load-hf {started_from} does not exist"
    return f"> {why}: all tensors are the checkpoint's ({dtype}), and config.json is made from the run's shape"


def _tokenizer(run: SavedRun, announce: Announce) -> Tokenizer | None:
    tokenizer = run.tokenizer()
    if tokenizer is None:
        announce("> the run's tokenizer no longer exists: the folder will have none")
    return tokenizer


def _coarsest_rounding(run_dtype: torch.dtype, written: torch.dtype, *, has_source: bool) -> torch.dtype:
    """The data type that only one side's weights were rounded to; fp32 where both have the same values.

    Frozen units are copied from a source of higher precision, so for these the checkpoint is the rounded side.
    """
    finer = torch.promote_types(run_dtype, written)
    if written == run_dtype or (finer == written and not has_source):
        return torch.float32
    return max(run_dtype, written, key=lambda dtype: torch.finfo(dtype).eps)


def _compare(folder: str, difference: LogitDifference, announce: Announce) -> None:
    if not difference.is_within:
        raise RunFailed(f"{folder}: {difference.describe()}; do not use it, and report this as a bug.")
    announce(f"check of {folder}: {difference.describe()}")
