"""``hft-megatron average``: a fine-tuned model and its base averaged weight by weight, as WiSE-FT does.

Run: ``hft-megatron average --tuned A --base B --coefficient 0.5 --output C``. The output's average.json records the
inputs. With ``--path 0.25 0.5 0.75`` both are read once for all three, each a folder in C.
"""

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Le

from hft_megatron.cli.boundary import StatusFolder, show
from hft_megatron.config.declared import check_bounds
from hft_megatron.conversion.merge_inputs import MergeFolders, check_folders, place_of
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """Options of ``hft-megatron average``."""

    folders: MergeFolders = field(default_factory=MergeFolders)
    coefficient: Annotated[float, Ge(0), Le(1)] | None = None
    """Share of the tuned model: base + coefficient x (tuned - base); 0.5 when unset."""
    path: tuple[float, ...] = ()
    """Several coefficients: for each a folder of its name in --output, from one reading of both models."""


def run(options: AverageOptions, status: StatusFolder) -> None:
    """Check the options and folders, and write the output. Raises UserError for every mistake."""
    check_bounds(options)
    _check_path(options)
    inputs = check_folders(options.folders)
    # Imported here, because a mistake in the options must not wait for torch.
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    from hft_megatron.conversion.merging import average_path, average_weights

    if options.path:
        average_path(inputs, options.path, show)
    else:
        average_weights(inputs, 0.5 if options.coefficient is None else options.coefficient, show)


def _check_path(options: AverageOptions) -> None:
    if options.path and options.coefficient is not None:
        raise UserError(
            f"--path and --coefficient {options.coefficient:g} are both given; add the coefficient to the path, or "
            f"leave one out."
        )
    names = set[str]()
    for coefficient in options.path:
        if not 0 <= coefficient <= 1:
            raise UserError(f"--path {coefficient:g}: every coefficient must be a number between 0 and 1.")
        if place_of(coefficient) in names:
            raise UserError(f"--path has {coefficient:g} twice, but each coefficient names a folder; give it once.")
        names.add(place_of(coefficient))
