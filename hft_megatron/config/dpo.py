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
    """Preference loss: DPO's (sigmoid), IPO's, or the hinge loss of SLiC."""
    dpo_beta: Annotated[float, Gt(0), SAME_RUN] = 0.1
    """Strength of the pull towards the reference model (beta); the tau of IPO."""
    dpo_label_smoothing: Annotated[float, Ge(0), Lt(0.5), SAME_RUN] = 0.0
    """Probability that the answers of a pair are swapped (conservative DPO; sigmoid only)."""
    dpo_average_log_probs: bool | None = None
    """Divide every answer's log-probability by its number of tokens; for ipo only, as its authors do, when unset."""
    dpo_sft_weight: Annotated[float, Ge(0), SAME_RUN] = 0.0
    """Weight of the chosen answer's mean token loss, which is added to the loss (RPO)."""
    dpo_reference: ReferenceKind = "precompute"
    """Source of the reference's log-probabilities. precompute: one pass over the data before training, kept on disk.
    shared: a copy of the trainable units, put in their place for a second forward pass in every step. model: a second
    model. All three give the same losses."""
    dpo_reference_model: str | None = None
    """Hugging Face folder of the reference model (not with shared); the weights that the run starts from when unset."""
    dpo_reference_cache: str | None = None
    """Folder for the log-probabilities of precompute; hft_megatron/reference in $XDG_CACHE_HOME, or in ~/.cache, when
    unset."""
    dpo_bad_pairs: BadPairs = "error"
    """Treatment of pairs that nothing can be learned from (equal answers, an empty answer, a prompt that leaves no room
    for an answer, answers to different prompts): stop with an error, or skip and count them."""


def loss_options_fit_together(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Label smoothing is defined for one loss only."""
    dpo = config.dpo
    if dpo.dpo_label_smoothing > 0 and dpo.dpo_loss != "sigmoid":
        raise UserError(
            f"--dpo-label-smoothing {dpo.dpo_label_smoothing} is defined for --dpo-loss sigmoid and not for "
            f"{dpo.dpo_loss}; leave it out."
        )


def pairs_can_be_read(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Refuse options of single examples, which do not apply to pairs."""
    check_pair_options(config.data)


def check_pair_options(data: DataConfig) -> None:
    """Raise UserError for an option of single examples, which does not apply to pairs."""
    if data.data_format not in (None, "preference"):
        raise UserError(f"--data-format {data.data_format} has no pairs; leave it out, or choose preference.")
    if data.loss_on == "all":
        raise UserError("--loss-on all would also compare the prompts of a pair, which are equal; leave it out.")
    if data.long_examples == "split":
        raise UserError("--long-examples split would cut an answer from its prompt; choose error, drop or truncate.")


def reference_is_clear(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A separate reference model is a folder of the same shape, and is not shared."""
    dpo = config.dpo
    folder = dpo.dpo_reference_model
    if folder is None:
        return
    if dpo.dpo_reference == "shared":
        raise UserError(
            f"--dpo-reference shared shares the frozen weights of the run, so the reference cannot be the model in "
            f"{folder}; choose precompute or model, or leave --dpo-reference-model out."
        )
    other = ModelShape.from_hf_config(load_hf_config(folder), source=f"{folder}/{HF_CONFIG_FILE}")
    if config.model.load_hf is not None and other != shape.base:
        raise UserError(
            f"--dpo-reference-model {folder} has another shape than --load-hf {config.model.load_hf}; give the model "
            f"that the run starts from, or one of its shape."
        )


def cache_can_be_written(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Find before the pass over all data that its cache cannot be written."""
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
"""Rules of preference tuning, in the order in which they run."""
