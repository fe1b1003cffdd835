"""``hft-megatron half-reset``: a part of a fine-tuned model's weights set back to the base model's, without training.

Run: ``hft-megatron half-reset --tuned A --base B --ratio 0.5 --level category --seed 1 --output C``. The units that
keep the tuned value are those that ``hft-megatron sft`` would train with the same options and seed; the output's
half_reset.json lists them, and ``hft-megatron plan --load-hf C --hft-plan C/half_reset.json`` shows them. With
``--criterion fapm`` or ``dare`` single entries are set back, as those two methods choose them.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt

from hft_megatron.cli.boundary import StatusFolder, show
from hft_megatron.config.declared import check_bounds, flag
from hft_megatron.config.hft import Counting, HFTConfig, Level
from hft_megatron.config.run import RunConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.config.validation import validate_plan
from hft_megatron.conversion.merge_inputs import MergeFolders, MergeInputs, check_folders, options_called
from hft_megatron.errors import UserError
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
    """Seed of the draw, or of what --criterion dare drops."""


@dataclass(frozen=True, kw_only=True)
class CriterionOptions:
    """What decides which values are kept."""

    criterion: Literal["random", "fapm", "dare"] = "random"
    """What keeps the tuned value. random: whole matrices, drawn by the options above. fapm: entries whose change is
    large, and small beside the weight (arXiv 2509.08255). dare: entries at random, with larger changes (2311.03099)."""
    sparsity: Annotated[float, Ge(0), Le(1)] | None = None
    """Share of a matrix's entries that --criterion fapm sets back; 0.9, the paper's, when unset."""
    drop_rate: Annotated[float, Ge(0), Lt(1)] | None = None
    """Probability that --criterion dare sets an entry back."""


@dataclass(frozen=True, kw_only=True)
class HalfResetOptions:
    """Everything that can be said about a Half-Reset."""

    folders: MergeFolders = field(default_factory=MergeFolders)
    draw: DrawOptions = field(default_factory=DrawOptions)
    criterion: CriterionOptions = field(default_factory=CriterionOptions)


def run(options: HalfResetOptions, status: StatusFolder) -> None:
    """Check the options and folders, choose what is kept and write the output. Raises UserError for every mistake."""
    check_bounds(options)
    _check_criterion(options)
    inputs = check_folders(options.folders)
    if options.criterion.criterion == "random":
        _reset_drawn(inputs, options.draw)
        return
    # Imported here, because a mistake in the options must not wait for torch.
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    from hft_megatron.conversion.kept_changes import drop_changes, keep_safe_changes

    chosen = options.criterion
    if chosen.criterion == "fapm":
        keep_safe_changes(inputs, 0.9 if chosen.sparsity is None else chosen.sparsity, show)
    else:
        assert chosen.drop_rate is not None
        drop_changes(inputs, chosen.drop_rate, options.draw.seed, show)


def _reset_drawn(inputs: MergeInputs, draw: DrawOptions) -> None:
    hft = HFTConfig(hft_ratio=draw.ratio, hft_level=draw.level, hft_counting=draw.counting, hft_seed=draw.seed)
    with options_called({"--hft-": "--"}):
        validate_plan(RunConfig(hft=hft), inputs.shape, world_size=1)
        plan = make_plan(inputs.shape, hft, default_seed=draw.seed)
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    from hft_megatron.conversion.merging import half_reset

    half_reset(inputs, plan, show)


_MEANT_FOR = {
    "ratio": ("random",),
    "level": ("random",),
    "counting": ("random",),
    "seed": ("random", "dare"),
    "sparsity": ("fapm",),
    "drop_rate": ("dare",),
}
"""Criteria that an option says something about."""


def _check_criterion(options: HalfResetOptions) -> None:
    criterion = options.criterion.criterion
    for group in (options.draw, options.criterion):
        for name, default in vars(type(group)()).items():
            value = getattr(group, name)
            if value != default and criterion not in _MEANT_FOR.get(name, (criterion,)):
                raise UserError(
                    f"{flag(name)} {value} is for --criterion {' or '.join(_MEANT_FOR[name])}, and it is {criterion}; "
                    f"leave one of the two out."
                )
    if criterion == "dare" and options.criterion.drop_rate is None:
        raise UserError(
            "--criterion dare needs --drop-rate, the probability that an entry is set back; add it, such as 0.9."
        )
