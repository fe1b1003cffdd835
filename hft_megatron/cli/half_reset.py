"""``hft-megatron half-reset``: half of a fine-tuned model's weights set back to the base model's, without training.

Run: ``hft-megatron half-reset --tuned A --base B --ratio 0.5 --level category --seed 1 --output C``. The units that
keep the tuned value are those that ``hft-megatron sft`` would train with the same options and seed; the output's
half_reset.json lists them, and ``hft-megatron plan --load-hf C --hft-plan C/half_reset.json`` shows them.
"""

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Le

from hft_megatron.cli.boundary import StatusFolder, show
from hft_megatron.config.declared import check_bounds
from hft_megatron.config.hft import Counting, HFTConfig, Level
from hft_megatron.config.run import RunConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.config.validation import validate_plan
from hft_megatron.conversion.merge_inputs import MergeFolders, check_folders, options_called
from hft_megatron.hft.plan import make_plan


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """Which weights keep the tuned value: the options of a run's --hft-ratio and so on, with their meaning."""

    ratio: Annotated[float, Ge(0), Le(1)] = HFTConfig.hft_ratio
    """Share of the matrices that keeps the tuned value. Embedding, final norm and head always keep it."""
    level: Level = HFTConfig.hft_level
    """Draw the share within every category of a layer (the paper's), as whole layers, or over the whole model."""
    counting: Counting = HFTConfig.hft_counting
    """What --ratio is a share of; they differ under grouped-query attention."""
    seed: Annotated[int, Ge(0)] = TrainingConfig.seed
    """Seed of the draw."""


@dataclass(frozen=True, kw_only=True)
class HalfResetOptions:
    """Everything that can be said about a Half-Reset."""

    folders: MergeFolders = field(default_factory=MergeFolders)
    draw: DrawOptions = field(default_factory=DrawOptions)


def run(options: HalfResetOptions, status: StatusFolder) -> None:
    """Check the options and folders, draw the plan and write the output. Raises UserError for every mistake."""
    check_bounds(options)
    inputs = check_folders(options.folders)
    draw = options.draw
    hft = HFTConfig(hft_ratio=draw.ratio, hft_level=draw.level, hft_counting=draw.counting, hft_seed=draw.seed)
    with options_called({"--hft-": "--"}):
        validate_plan(RunConfig(hft=hft), inputs.shape, world_size=1)
        plan = make_plan(inputs.shape, hft, default_seed=draw.seed)
    # Imported here, because a mistake in the options must not wait for torch.
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    from hft_megatron.conversion.merging import half_reset

    half_reset(inputs, plan, show)
