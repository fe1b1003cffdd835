"""Rules about preference tuning. Every rule takes (options, shape, world size) and raises UserError."""

from pathlib import Path

from hft_megatron.config.model_shape import HF_CONFIG_FILE, ModelShape, load_hf_config
from hft_megatron.config.schema import DataConfig, DpoConfig, RunConfig
from hft_megatron.errors import UserError


def loss_options_fit_together(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Numbers outside of their ranges turn the preference around, or do nothing."""
    dpo = config.dpo
    if not dpo.dpo_beta > 0:
        raise UserError(f"--dpo-beta {dpo.dpo_beta} must be above 0; 0.1 is usual.")
    if not 0 <= dpo.dpo_label_smoothing < 0.5:
        raise UserError(
            f"--dpo-label-smoothing {dpo.dpo_label_smoothing} must be from 0 to below 0.5; from 0.5 on the rejected "
            f"answer would be preferred."
        )
    if dpo.dpo_label_smoothing > 0 and dpo.dpo_loss != "sigmoid":
        raise UserError(
            f"--dpo-label-smoothing {dpo.dpo_label_smoothing} is defined for --dpo-loss sigmoid and not for "
            f"{dpo.dpo_loss}; leave it out."
        )
    if dpo.dpo_sft_weight < 0:
        raise UserError(f"--dpo-sft-weight {dpo.dpo_sft_weight} must not be below 0; 0 adds nothing.")


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
    if config.model.load_hf is not None and other != shape:
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
