"""The scores of ``--hft-selection spectrum`` for a run: computed once, then kept beside its checkpoints."""

import json
from pathlib import Path

import torch.distributed as dist

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.run_folder import SPECTRUM_FILE
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.errors import UserError
from hft_megatron.hft.spectrum import spectrum_scores
from hft_megatron.hft.units import MATRIX_CATEGORIES, units_of
from hft_megatron.parallel.groups import Placement
from hft_megatron.training.inputs import Inputs


def scores_of_run(inputs: Inputs, placement: Placement) -> dict[str, float] | None:
    """Signal-to-noise ratio by unit; None for other selections. Collective over all ranks.

    Raises UserError when a matrix or the saved scores can't be read.
    """
    config = inputs.config
    if config.hft.hft_selection != "spectrum":
        return None
    if inputs.resumes:
        assert inputs.checkpoint is not None
        return _saved_scores(inputs.checkpoint.parent / SPECTRUM_FILE, inputs.shape)
    assert config.model.load_hf is not None, "the rules of the options ask for it"
    with HuggingFaceWeights(config.model.load_hf) as weights:
        return spectrum_scores(inputs.shape, weights.read, device=placement.device)


def _saved_scores(file: Path, shape: ModelShape) -> dict[str, float]:
    """The scores of the first run, read by rank 0 for all ranks: one that can't read them must not leave the others."""
    answer: list[tuple[dict[str, float], str | None]] = [({}, None)]
    if dist.get_rank() == 0:
        try:
            answer = [(read_scores(file, shape), None)]
        except UserError as error:
            answer = [({}, str(error))]
    dist.broadcast_object_list(answer, src=0)
    scores, mistake = answer[0]
    if mistake is not None:
        raise UserError(mistake)
    return scores


def read_scores(file: Path, shape: ModelShape) -> dict[str, float]:
    """The scores that a run left in its folder; UserError when they can't be read or are another model's."""
    try:
        scores: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        missing = {unit.name for unit in units_of(shape) if unit.category in MATRIX_CATEGORIES} - set(scores)
        mistake = f"it has no score of {min(missing)}" if missing else None
    except (OSError, ValueError, TypeError) as error:
        mistake = str(error)
    if mistake is not None:
        raise UserError(
            f"--load {file.parent}: {SPECTRUM_FILE} can't be used ({mistake}); copy the run's folder again."
        )
    return scores
