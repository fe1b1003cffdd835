"""Options of the method: which weight matrices train in a round, what happens between rounds, and their rules.

What depends on the names of units (patterns that match nothing) is found where the plan is drawn.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le

from hft_megatron.config import derived
from hft_megatron.config.declared import SAME_RUN, FormerName, flag
from hft_megatron.config.names import SELECTIONS, SelectionName
from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.run import RunConfig


Level = Literal["category", "layer", "model"]
Counting = Literal["matrices", "parameters"]
Pairing = Literal["independent", "complementary"]
Rotation = Literal["independent", "complementary", "fixed"]


@dataclass(frozen=True, kw_only=True)
class HFTConfig:
    """Choice of the weight matrices that train in a round, and the change from one round to the next."""

    hft_ratio: Annotated[float, Ge(0), Le(1), SAME_RUN] = 0.5
    """Share of the matrices that trains. 1 is full fine-tuning."""
    hft_level: Annotated[Level, SAME_RUN] = "category"
    """Scope of the draw: within every category of a layer (the paper's best), whole layers, or the whole model."""
    hft_selection: Annotated[SelectionName, SAME_RUN] = "random"
    """Selection rule. random: draws, as in the paper. spectrum: the matrices with the highest signal-to-noise ratio of
    singular values, computed once, so that only complementary rotation changes them. lisa: embedding, head and
    --hft-ratio of the layers, redrawn every round. hift: one group of layers after the other, each --hft-ratio of the
    model."""
    hft_counting: Annotated[Counting, SAME_RUN] = "matrices"
    """Quantity that --hft-ratio is a share of; the two differ under grouped-query attention. With parameters, every
    layer trains the share of each category that is closest to the ratio."""
    hft_pairing: Annotated[Pairing, SAME_RUN] = "independent"
    """Relation between neighbouring layers. independent: every layer is drawn on its own. complementary: layers 2i and
    2i+1 get complementary draws, so that every pair trains exactly half of its parameters (needs --hft-ratio 0.5; an
    odd last layer is drawn alone)."""
    hft_rotation: Annotated[Rotation, SAME_RUN] = "independent"
    """Relation between rounds. independent: every round has its own draw (the paper). complementary: each round trains
    the units that were frozen in the round before (needs --hft-ratio 0.5). fixed: all rounds are like the first.
    Embedding, final norm and head train in every round unless --hft-freeze-... freezes them."""
    hft_seed: Annotated[int, Ge(0)] | None = None
    """Seed of the draw; --seed when unset."""
    hft_round_interval: Annotated[str, SAME_RUN] = "stage"
    """Length of a round: `stage` (one plan for the whole run or stage), `epoch`, or a number of iterations."""
    hft_first_round: Annotated[int, Ge(0), SAME_RUN] | None = None
    """Round to start from; 0 when unset. With 1, --hft-rotation complementary trains the complement of round 0 of an
    earlier run with the same options."""
    hft_moments: Annotated[Literal["reset", "carry"], SAME_RUN] = "reset"
    """AdamW's moments at a new round. reset: all start at zero. carry: units that continue to train keep theirs. That
    includes the moments of the run that --finetune starts from, if --hft-first-round continues its numbering, and those
    of the stage or task before."""
    hft_frozen_moments: Annotated[Literal["drop", "host"], SAME_RUN, FormerName("hft_resting_moments")] = "drop"
    """Moments of units that become frozen, under --hft-moments carry: drop them, or keep them in host memory until the
    unit trains again."""
    hft_lr_schedule: Literal["run", "round"] = "run"
    """Learning rate schedule: one warm-up and decay over the whole run, or one per round."""
    hft_freeze_embedding: Annotated[bool, SAME_RUN] = False
    """Freeze the embedding in every round. Tied embeddings need --hft-freeze-head as well."""
    hft_freeze_head: Annotated[bool, SAME_RUN] = False
    """Freeze the head in every round. Tied embeddings need --hft-freeze-embedding as well."""
    hft_train: Annotated[str, SAME_RUN] | None = None
    """Units that train in every round: comma-separated patterns over Hugging Face names, such as
    `model.layers.0.*,*.q_proj`. They override the draw."""
    hft_freeze: Annotated[str, SAME_RUN] | None = None
    """Units that stay frozen in every round: comma-separated patterns over Hugging Face names. They override the
    draw."""
    hft_plan: str | None = None
    """Plan file to use instead of a draw, written by `hft-megatron plan --save` and possibly edited."""
    hft_audit: bool = False
    """Fingerprint every frozen shard at the start of a round and verify it at the end."""
    hft_audit_interval: Annotated[int, Ge(1)] | None = None
    """Verify every N iterations as well (needs --hft-audit)."""


CHOICE_OF_UNITS = (
    "hft_ratio",
    "hft_level",
    "hft_selection",
    "hft_counting",
    "hft_pairing",
    "hft_rotation",
    "hft_seed",
    "hft_first_round",
    "hft_freeze_embedding",
    "hft_freeze_head",
    "hft_train",
    "hft_freeze",
)
"""Options that fix which units train in which round, unless --hft-plan does."""

_DEFAULTS = {field.name: field.default for field in fields(HFTConfig)}


def plan_file_stands_alone(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Refuse options of the draw beside --hft-plan, which would ignore them in silence."""
    path = config.hft.hft_plan
    if path is None:
        return
    if not Path(path).is_file() or not os.access(path, os.R_OK):
        raise UserError(f"--hft-plan {path} is not a readable file; give a file from `hft-megatron plan --save`.")
    for name in CHOICE_OF_UNITS:
        # The resolved options of a run hold its seed, set or not.
        is_default_seed = name == "hft_seed" and config.hft.hft_seed == config.training.seed
        if getattr(config.hft, name) != _DEFAULTS[name] and not is_default_seed:
            raise UserError(
                f"{_given(config.hft, name)} is an option of the draw, but --hft-plan {path} already says which units "
                "train; leave one of the two out, or edit the plan file."
            )


def selection_options_fit_together(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Refuse options that a selection with its own units and order does not have."""
    hft = config.hft
    selection = SELECTIONS[hft.hft_selection]
    for name in selection.without:
        if getattr(hft, name) != _DEFAULTS[name]:
            raise UserError(
                f"{_given(hft, name)} has no effect with --hft-selection {hft.hft_selection}, which "
                f"{selection.what}; leave {flag(name)} out."
            )


def scores_have_weights(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Random weights have no signal to rank by."""
    name = config.hft.hft_selection
    if SELECTIONS[name].needs_scores and config.model.load_hf is None:
        raise UserError(
            f"--hft-selection {name} ranks the matrices of a trained model; give its folder with --load-hf."
        )


def halves_are_halves(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A complement has the same size only at ratio 0.5, and pairs of layers exist only at the category level."""
    hft = config.hft
    for name, value in (("hft_pairing", hft.hft_pairing), ("hft_rotation", hft.hft_rotation)):
        if value == "complementary" and hft.hft_ratio != 0.5:
            raise UserError(
                f"{_given(hft, name)} needs --hft-ratio 0.5, but it is {hft.hft_ratio}; leave one of the two out."
            )
    if hft.hft_pairing == "complementary" and hft.hft_level != "category":
        raise UserError(
            f"--hft-pairing complementary pairs the draws of single layers, but --hft-level {hft.hft_level} has none; "
            "use --hft-level category."
        )


def frozen_units_exist(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Tied embeddings are frozen together, and no pattern of a list is empty."""
    hft = config.hft
    if shape.tie_embeddings and hft.hft_freeze_embedding != hft.hft_freeze_head:
        given, other = "--hft-freeze-embedding", "--hft-freeze-head"
        if hft.hft_freeze_head:
            given, other = other, given
        raise UserError(
            f"{given} cannot be used alone: the model's embedding and head are tied and so one weight; "
            f"add {other}, or leave {given} out."
        )
    for name in ("hft_train", "hft_freeze"):
        if "" in derived.patterns(getattr(hft, name)):
            raise UserError(
                f"{flag(name)} {getattr(hft, name)!r} has an empty pattern; separate patterns by single commas."
            )


def rounds_and_moments_fit_together(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A round has a length, and options of a switch need what they refine."""
    hft = config.hft
    interval = hft.hft_round_interval
    is_number = interval.isascii() and interval.isdecimal() and int(interval) >= 1
    if interval not in ("stage", "epoch") and not is_number:
        raise UserError(
            f"--hft-round-interval {interval} must be stage, epoch, or a number of iterations of at least 1."
        )
    if hft.hft_frozen_moments == "host" and hft.hft_moments != "carry":
        raise UserError(
            "--hft-frozen-moments host needs --hft-moments carry: after a reset there are no moments to keep; "
            "add it or leave --hft-frozen-moments out."
        )
    if hft.hft_audit_interval is not None and not hft.hft_audit:
        raise UserError(
            f"--hft-audit-interval {hft.hft_audit_interval} needs --hft-audit; add it or leave the interval out."
        )


CHOICE_RULES = (selection_options_fit_together, halves_are_halves, frozen_units_exist)
"""Rules about the plan of one round."""

METHOD_RULES = (
    plan_file_stands_alone,
    selection_options_fit_together,
    scores_have_weights,
    halves_are_halves,
    frozen_units_exist,
    rounds_and_moments_fit_together,
)
"""All rules of the method, for a run that draws plans."""


def _given(hft: HFTConfig, name: str) -> str:
    """The option as the user wrote it."""
    value: Any = getattr(hft, name)
    return flag(name) if value is True else f"{flag(name)} {value}"


def scores_are_of_the_first_weights(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Spectrum scores the --load-hf folder's weights, and --finetune starts from others."""
    if config.checkpoint.finetune and SELECTIONS[config.hft.hft_selection].needs_scores:
        raise UserError(
            f"--hft-selection {config.hft.hft_selection} scores the weights of --load-hf, but --finetune starts from "
            f"those of --load {config.checkpoint.load}; export that run with --save-hf and give the export as "
            "--load-hf instead."
        )
