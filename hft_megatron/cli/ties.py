"""``hft-megatron ties``: merges models fine-tuned from one base where their largest changes agree, without training.

Run: ``hft-megatron ties --tuned A --others B C --base M --density 0.2 --output D``. Without ``--others`` the changes of
one model are trimmed to the largest. The output's ties.json records the inputs.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Le

from hft_megatron.cli.boundary import StatusFolder, show
from hft_megatron.config.declared import check_bounds
from hft_megatron.conversion.merge_inputs import MergeFolders, MergeInputs, check_folders, options_called
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TiesRule:
    """Rule of the merge: the kept changes, and their scale."""

    others: tuple[str, ...] = ()
    """Hugging Face folders of further models fine-tuned from --base."""
    density: Annotated[float, Gt(0), Le(1)] = 0.2
    """Share of every tensor's entries whose changes are kept: the largest of each model."""
    coefficient: Annotated[float, Ge(0)] = 1.0
    """Factor of the merged change."""


@dataclass(frozen=True, kw_only=True)
class TiesOptions:
    """Options of ``hft-megatron ties``."""

    folders: MergeFolders = field(default_factory=MergeFolders)
    rule: TiesRule = field(default_factory=TiesRule)


def run(options: TiesOptions, status: StatusFolder) -> None:
    """Check the options and folders, and write the output. Raises UserError for every mistake."""
    check_bounds(options)
    inputs = [check_folders(options.folders), *_others(options)]
    # Imported here, because a mistake in the options must not wait for torch.
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    from hft_megatron.conversion.kept_changes import merge_changes

    merge_changes(inputs, options.rule.density, options.rule.coefficient, show)


def _others(options: TiesOptions) -> list[MergeInputs]:
    """The other models, each checked against the base like the first."""
    found, seen = [], {Path(str(options.folders.tuned)).resolve()}
    for folder in options.rule.others:
        if Path(folder).resolve() in seen:
            raise UserError(f"--others {folder} is given twice, or is the same as --tuned; name every model once.")
        seen.add(Path(folder).resolve())
        with options_called({"--tuned": "--others"}):
            inputs = check_folders(replace(options.folders, tuned=folder))
        notes = (note.replace("--tuned, which is kept,", f"--others {folder}") for note in inputs.notes)
        found.append(replace(inputs, notes=tuple(notes)))
    return found
