"""``hft-megatron half-reset``: resets a part of a fine-tuned model's weights to the base model's, without training.

Run: ``hft-megatron half-reset --tuned A --base B --ratio 0.5 --level category --seed 1 --output C``. The units that
keep the tuned value are those that ``hft-megatron sft`` would train with the same options and seed; the output's
half_reset.json lists them, and ``hft-megatron plan --load-hf C --hft-plan C/half_reset.json`` shows them. With
``--criterion fapm`` or ``dare`` single entries are reset, chosen by those two methods.
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
    """Draw of the weights that keep the tuned value: the --hft- options of a run, with the same meaning."""

    ratio: Annotated[float, Ge(0), Le(1)] = HFTConfig.hft_ratio
    """Share of the matrices that keeps the tuned value. Embedding, final norm and head always keep it."""
    level: Level = HFTConfig.hft_level
    """Scope of the draw: within every category of a layer (the paper's), whole layers, or the whole model."""
    counting: Counting = HFTConfig.hft_counting
    """Quantity that --ratio is a share of; the two differ under grouped-query attention."""
    seed: Annotated[int, Ge(0)] = TrainingConfig.seed
    """Seed of the draw, or of the entries that --criterion dare drops."""


@dataclass(frozen=True, kw_only=True)
class CriterionOptions:
    """Criterion by which values are kept."""

    criterion: Literal["random", "fapm", "dare"] = "random"
    """Criterion for keeping the tuned value. random: whole matrices, drawn by the options above. fapm: entries with a
    large change that is small relative to the weight (arXiv 2509.08255). dare: random entries, with their changes
    scaled up (arXiv 2311.03099)."""
    sparsity: Annotated[float, Ge(0), Le(1)] | None = None
    """Share of a matrix's entries that --criterion fapm resets; 0.9, the paper's, when unset."""
    drop_rate: Annotated[float, Ge(0), Lt(1)] | None = None
    """Probability that --criterion dare resets an entry."""


@dataclass(frozen=True, kw_only=True)
class HalfResetOptions:
    """Options of ``hft-megatron half-reset``."""

    folders: MergeFolders = field(default_factory=MergeFolders)
    draw: DrawOptions = field(default_factory=DrawOptions)
    criterion: CriterionOptions = field(default_factory=CriterionOptions)


def run(options: HalfResetOptions, status: StatusFolder) -> None:
    """Check options and folders, choose the kept values and write the output. Raises UserError for every mistake."""
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
"""Criteria that an option applies to."""


def _check_criterion(options: HalfResetOptions) -> None:
    criterion = options.criterion.criterion
    for group in (options.draw, options.criterion):
        for name, default in vars(type(group)()).items():
            value = getattr(group, name)
            if value != default and criterion not in _MEANT_FOR.get(name, (criterion,)):
                raise UserError(
                    f"{flag(name)} {value} is for --criterion {' or '.join(_MEANT_FOR[name])}, but it is {criterion}; "
                    f"leave one of the two out."
                )
    if criterion == "dare" and options.criterion.drop_rate is None:
        raise UserError(
            "--criterion dare needs --drop-rate, the probability that an entry is reset; add it, such as 0.9."
        )
