"""``hft-megatron average``: a fine-tuned model and its base averaged weight by weight, as WiSE-FT does.

Run: ``hft-megatron average --tuned A --base B --coefficient 0.5 --output C``. The output's average.json says
what it is of.
"""

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Le

from hft_megatron.cli.boundary import StatusFolder, show
from hft_megatron.config.declared import check_bounds
from hft_megatron.conversion.merge_inputs import MergeFolders, check_folders


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """Everything that can be said about an average."""

    folders: MergeFolders = field(default_factory=MergeFolders)
    coefficient: Annotated[float, Ge(0), Le(1)] = 0.5
    """Share of the tuned model: base + coefficient x (tuned - base)."""


def run(options: AverageOptions, status: StatusFolder) -> None:
    """Check the options and folders, and write the output. Raises UserError for every mistake."""
    check_bounds(options)
    inputs = check_folders(options.folders)
    # Imported here, because a mistake in the options must not wait for torch.
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    from hft_megatron.conversion.merging import average_weights

    average_weights(inputs, options.coefficient, show)
