"""``hft-megatron average``: a fine-tuned model and its base averaged weight by weight, as WiSE-FT does.

Run: ``hft-megatron average --tuned A --base B --coefficient 0.5 --output C``. The output's average.json says
what it is of.
"""

from dataclasses import dataclass, field

from hft_megatron.cli.boundary import StatusFolder, show
from hft_megatron.conversion.merge_inputs import MergeFolders, check_folders
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """Everything that can be said about an average."""

    folders: MergeFolders = field(default_factory=MergeFolders)
    coefficient: float = 0.5
    """Share of the tuned model, 0 to 1: base + coefficient x (tuned - base)."""


def run(options: AverageOptions, status: StatusFolder) -> None:
    """Check the options and folders, and write the output. Raises UserError for every mistake."""
    if not 0 <= options.coefficient <= 1:
        raise UserError(
            f"--coefficient {options.coefficient} must be between 0, which is the base model, and 1, the tuned one."
        )
    inputs = check_folders(options.folders)
    # Imported here, because a mistake in the options must not wait for torch.
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    from hft_megatron.conversion.merging import average_weights

    average_weights(inputs, options.coefficient, show)
