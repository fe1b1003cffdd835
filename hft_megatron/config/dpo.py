"""Options of preference tuning, and their rules. Every rule takes (options, shape, world size)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Lt

from hft_megatron.config.declared import SAME_RUN
from hft_megatron.config.model_shape import HF_CONFIG_FILE, ModelShape, load_hf_config
from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.data import DataConfig
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.run import RunConfig


PreferenceLoss = Literal["sigmoid", "ipo", "hinge"]

ReferenceKind = Literal["precompute", "shared", "model"]

BadPairs = Literal["error", "skip"]


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """Learning from preference pairs."""

    dpo_loss: Annotated[PreferenceLoss, SAME_RUN] = "sigmoid"
    """DPO's loss, IPO's, or the hinge of SLiC."""
    dpo_beta: Annotated[float, Gt(0), SAME_RUN] = 0.1
    """How much the policy is held to the reference model; the tau of IPO."""
    dpo_label_smoothing: Annotated[float, Ge(0), Lt(0.5), SAME_RUN] = 0.0
    """Probability that the answers of a pair were confused (conservative DPO; sigmoid only)."""
    dpo_average_log_probs: bool | None = None
    """Divide every answer's log-probability by its number of tokens; for ipo, as its authors do, when unset."""
    dpo_sft_weight: Annotated[float, Ge(0), SAME_RUN] = 0.0
    """Add this times the mean token loss of the chosen answer (RPO)."""
    dpo_reference: ReferenceKind = "precompute"
    """Where the reference's log-probabilities come from: one pass over the data before training, kept on disk;
    a copy of just the units that train, put in their place for a second forward pass in every step; or a second
    model. All three give the same losses."""
    dpo_reference_model: str | None = None
    """Hugging Face folder of the reference model (not for shared); the weights that the run starts from when unset."""
    dpo_reference_cache: str | None = None
    """Folder for the log-probabilities of precompute; hft_megatron/reference in $XDG_CACHE_HOME, or in ~/.cache, when
    unset."""
    dpo_bad_pairs: BadPairs = "error"
    """Stop at a pair that nothing can be learned of (equal answers, an empty one, a prompt that leaves no room for an
    answer, answers to different prompts), or leave such pairs out and count them."""


def loss_options_fit_together(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Smoothing has a meaning for one loss only."""
    dpo = config.dpo
    if dpo.dpo_label_smoothing > 0 and dpo.dpo_loss != "sigmoid":
        raise UserError(
            f"--dpo-label-smoothing {dpo.dpo_label_smoothing} is defined for --dpo-loss sigmoid and not for "
            f"{dpo.dpo_loss}; leave it out."
        )


def pairs_can_be_read(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Options of examples that pairs have no use for."""
    check_pair_options(config.data)


def check_pair_options(data: DataConfig) -> None:
    """Raise UserError for an option of examples that pairs have no use for."""
    if data.data_format not in (None, "preference"):
        raise UserError(f"--data-format {data.data_format} has no pairs; leave it out, or choose preference.")
    if data.loss_on == "all":
        raise UserError("--loss-on all would compare the prompts of a pair, which are the same; leave it out.")
    if data.long_examples == "split":
        raise UserError("--long-examples split cuts an answer from its prompt; choose error, drop or truncate.")


def reference_is_clear(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A reference model of its own is a folder of the same shape, and needs room of its own."""
    dpo = config.dpo
    folder = dpo.dpo_reference_model
    if folder is None:
        return
    if dpo.dpo_reference == "shared":
        raise UserError(
            f"--dpo-reference shared shares the weights that rest, so it can't be the model in {folder}; choose "
            f"precompute or model, or leave --dpo-reference-model out."
        )
    other = ModelShape.from_hf_config(load_hf_config(folder), source=f"{folder}/{HF_CONFIG_FILE}")
    if config.model.load_hf is not None and other != shape.base:
        raise UserError(
            f"--dpo-reference-model {folder} has another shape than --load-hf {config.model.load_hf}; give the model "
            f"that the tuning starts from, or one of its shape."
        )


def cache_can_be_written(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """What would fail only after the pass over all data is found now."""
    folder = config.dpo.dpo_reference_cache
    if (
        folder is not None
        and config.dpo.dpo_reference == "precompute"
        and Path(folder).exists()
        and not Path(folder).is_dir()
    ):
        raise UserError(f"--dpo-reference-cache {folder} is a file, not a folder; choose another.")


def note_unused_cache(dpo: DpoConfig) -> list[str]:
    """A line for the log where --dpo-reference-cache is given to a run that keeps no log-probabilities."""
    if dpo.dpo_reference_cache is None or dpo.dpo_reference == "precompute":
        return []
    return [
        f"--dpo-reference-cache {dpo.dpo_reference_cache} is not used: --dpo-reference {dpo.dpo_reference} keeps no "
        "log-probabilities"
    ]


DPO_RULES = (loss_options_fit_together, pairs_can_be_read, reference_is_clear, cache_can_be_written)
"""In this order."""
