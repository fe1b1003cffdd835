"""Rules about the method: which options of the choice of units and of the rounds go together.

Every rule takes (options, shape, world size) and raises UserError with one sentence; ``validation`` runs them. What
depends on the names of units (patterns that match nothing) is found where the plan is drawn.
"""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from hft_megatron.config import derived
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.names import SELECTIONS
from hft_megatron.config.schema import HFTConfig, RunConfig
from hft_megatron.errors import UserError

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
"""The options that fix which units train in which round, unless --hft-plan does."""
_DEFAULTS = {field.name: field.default for field in fields(HFTConfig)}


def ratio_is_a_share(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """From nothing (embeddings and the final norm still train) to full fine-tuning."""
    ratio = config.hft.hft_ratio
    if not 0 <= ratio <= 1:
        raise UserError(
            f"--hft-ratio {ratio} must be between 0 and 1; 0.5 trains half of the matrices, 1 is full fine-tuning."
        )


def plan_file_stands_alone(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A plan from a file is not drawn, so an option of the draw would be ignored in silence."""
    path = config.hft.hft_plan
    if path is None:
        return
    if not Path(path).is_file() or not os.access(path, os.R_OK):
        raise UserError(f"--hft-plan {path} is not a readable file; give one of `hft-megatron plan --save`.")
    for name in CHOICE_OF_UNITS:
        # The resolved options of a run hold its seed, set or not.
        is_default_seed = name == "hft_seed" and config.hft.hft_seed == config.training.seed
        if getattr(config.hft, name) != _DEFAULTS[name] and not is_default_seed:
            raise UserError(
                f"{_given(config.hft, name)} is an option of the draw, and --hft-plan {path} says which units train; "
                "leave one of the two out, or edit the plan file."
            )


def selection_options_fit_together(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Selections that have their own units and order."""
    hft = config.hft
    selection = SELECTIONS[hft.hft_selection]
    for name in selection.without:
        if getattr(hft, name) != _DEFAULTS[name]:
            raise UserError(
                f"{_given(hft, name)} has no meaning with --hft-selection {hft.hft_selection}, which "
                f"{selection.what}; leave {_flag(name)} out."
            )


def scores_have_weights(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Random weights have no signal to rank by."""
    name = config.hft.hft_selection
    if SELECTIONS[name].needs_scores and config.model.load_hf is None:
        raise UserError(
            f"--hft-selection {name} ranks the matrices of a trained model; name its folder with --load-hf."
        )


def halves_are_halves(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A complement has the same size only at ratio 0.5, and pairs of layers exist only at the category level."""
    hft = config.hft
    for name, value in (("hft_pairing", hft.hft_pairing), ("hft_rotation", hft.hft_rotation)):
        if value == "complementary" and hft.hft_ratio != 0.5:
            raise UserError(f"{_given(hft, name)} needs --hft-ratio 0.5, and it is {hft.hft_ratio}; leave one out.")
    if hft.hft_pairing == "complementary" and hft.hft_level != "category":
        raise UserError(
            f"--hft-pairing complementary pairs the draws of single layers, and --hft-level {hft.hft_level} has none; "
            "use --hft-level category."
        )


def frozen_units_exist(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Tied embeddings are one weight, and a list of patterns has no holes."""
    hft = config.hft
    if shape.tie_embeddings and hft.hft_freeze_embedding != hft.hft_freeze_head:
        given, other = "--hft-freeze-embedding", "--hft-freeze-head"
        if hft.hft_freeze_head:
            given, other = other, given
        raise UserError(
            f"{given} alone can't be had: the model's embedding and head are tied and so one weight; "
            f"add {other}, or leave {given} out."
        )
    for name in ("hft_train", "hft_freeze"):
        if "" in derived.patterns(getattr(hft, name)):
            raise UserError(
                f"{_flag(name)} {getattr(hft, name)!r} has an empty pattern; separate names or patterns by one comma."
            )


def rounds_and_moments_fit_together(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A round has a length, and options of a switch need what they refine."""
    hft = config.hft
    interval = hft.hft_round_interval
    is_number = interval.isascii() and interval.isdecimal() and int(interval) >= 1
    if interval not in ("stage", "epoch") and not is_number:
        raise UserError(
            f"--hft-round-interval {interval} must be stage, epoch or a whole number of iterations of at least 1."
        )
    if hft.hft_resting_moments == "host" and hft.hft_moments != "carry":
        raise UserError(
            "--hft-resting-moments host needs --hft-moments carry: after a reset no moments are left to keep; "
            "add it or leave --hft-resting-moments out."
        )
    if hft.hft_audit_interval is not None and not hft.hft_audit:
        raise UserError(
            f"--hft-audit-interval {hft.hft_audit_interval} needs --hft-audit; add it or leave the interval out."
        )


CHOICE_RULES = (ratio_is_a_share, selection_options_fit_together, halves_are_halves, frozen_units_exist)
"""Those about one round's plan."""
METHOD_RULES = (
    ratio_is_a_share,
    plan_file_stands_alone,
    selection_options_fit_together,
    scores_have_weights,
    halves_are_halves,
    frozen_units_exist,
    rounds_and_moments_fit_together,
)
"""All of them, for whoever draws plans in a run."""


def _given(hft: HFTConfig, name: str) -> str:
    """The option as the user wrote it."""
    value: Any = getattr(hft, name)
    return _flag(name) if value is True else f"{_flag(name)} {value}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
