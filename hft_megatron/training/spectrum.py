"""The scores of ``--hft-selection spectrum`` for a run: computed once, then kept beside its checkpoints."""

import json

from hft_megatron.config.run_folder import SPECTRUM_FILE
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.errors import UserError
from hft_megatron.hft.spectrum import spectrum_scores
from hft_megatron.parallel.groups import Placement
from hft_megatron.training.inputs import Inputs


def scores_of_run(inputs: Inputs, placement: Placement) -> dict[str, float] | None:
    """Signal-to-noise ratio by unit; None for other selections. Collective over all ranks.

    Raises UserError when a matrix or the saved scores can't be read.
    """
    config = inputs.config
    if config.hft.hft_selection != "spectrum":
        return None
    if inputs.checkpoint is not None:
        file = inputs.checkpoint.parent / SPECTRUM_FILE
        try:
            saved: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--load {file.parent}: {SPECTRUM_FILE} can't be read ({error}); copy it again.") from error
        return saved
    assert config.model.load_hf is not None, "the rules of the options ask for it"
    with HuggingFaceWeights(config.model.load_hf) as weights:
        return spectrum_scores(inputs.shape, weights.read, device=placement.device)
