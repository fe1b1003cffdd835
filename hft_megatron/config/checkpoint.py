"""Options of checkpoints and exports, and their rules, which look at folders and read no weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from hft_megatron.config.model_shape import HF_CONFIG_FILE
from hft_megatron.config.run_folder import same_folder
from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints and exports: where they are written and read."""

    save: str | None = None
    """Folder of the run, for checkpoints with their plans, metrics.jsonl and the resolved config."""
    load: str | None = None
    """Folder of a run to resume from its newest complete checkpoint. If it holds none, the run starts fresh, and the
    log says so. Load only folders you trust: torch reads a checkpoint's index with pickle."""
    load_fallback: bool = False
    """Resume from the newest intact checkpoint if the newest one is damaged, instead of stopping."""
    exit_on_missing_checkpoint: bool = False
    """End with an error (exit code 2) if --load holds no checkpoint, instead of starting fresh."""
    finetune: bool = False
    """Start a new run from the weights of --load, with its own rounds, data and schedule (--hft-moments carry may take
    moments, too). If --save already holds a checkpoint of the new run, it resumes from there."""
    use_checkpoint_args: bool = False
    """Take the model from the run in --load if this command gives none."""
    load_optim: bool = True
    """Load the optimizer's state from --load. With --no-load-optim only weights, position and data are resumed: moments
    start at zero and fp32 masters from the weights, while the learning rate follows the position. --finetune never
    loads it."""
    override_opt_param_scheduler: bool = False
    """Use this command's schedule and optimizer options on resume (--lr, --min-lr, the length of the decay,
    --weight-decay, --adam-beta1 and so on) where the checkpoint has others. Without this option the same happens, with
    a warning."""
    use_checkpoint_opt_param_scheduler: bool = False
    """Use the checkpoint's schedule and optimizer options on resume, with its length of the decay, instead of this
    command's: a run that is made longer keeps its learning rates."""
    save_interval: Annotated[int, Ge(1)] | None = None
    """Iterations between checkpoints. With --save the last iteration is always saved."""
    keep_last: Annotated[int, Ge(1)] | None = None
    """Number of newest checkpoints to keep; older ones are deleted after each save. All are kept when unset."""
    save_retain_interval: Annotated[int, Ge(1)] | None = None
    """Iterations whose multiples are kept as checkpoints; others are deleted, except the newest (or --keep-last)."""
    async_save: bool = False
    """Write checkpoints in the background while training continues."""
    save_trained_only: bool = False
    """Leave weights that are frozen in the round out of checkpoints. They are read from the --load-hf folder or from
    the checkpoint that --finetune (or a task or stage) starts from, which must then be kept, or, from the second round
    on, from the round's first checkpoint, which is whole. Their digests are checked on loading."""
    save_hf: str | None = None
    """Folder for the export in Hugging Face's format at the end; adapters (--lora-rank) are merged into their
    matrices."""
    save_lora: str | None = None
    """Folder for the adapters of --lora-rank at the end, in PEFT's format."""
    save_hf_interval: Annotated[int, Ge(1)] | None = None
    """Iterations between exports during training, each into a folder of --save-hf, such as iter_0000500."""
    save_hf_keep: Annotated[int, Ge(1)] | None = None
    """Number of newest exports of --save-hf-interval to keep, beside the best one; all are kept when unset."""
    save_hf_best: str | None = None
    """Validation metric, such as `lm loss`, by which exports.json names the best export, which is never deleted. Every
    export needs a validation (--eval-interval)."""
    save_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Data type of the exported tensors; each tensor's own in the source folder (or the run's) when unset."""
    keep_source_tokenizer: bool = False
    """Copy the source folder's tokenizer files to the export even if transformers reads other ids from them than the
    ones in training. Without it the export then has files that give the trained ids, and the log says so."""


def outputs_have_a_place(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Options about an output or input come with the option that names its folder."""
    checkpoint, logging = config.checkpoint, config.logging
    needs = (
        ("--save-interval", checkpoint.save_interval, "--save", checkpoint.save),
        ("--keep-last", checkpoint.keep_last, "--save", checkpoint.save),
        ("--save-retain-interval", checkpoint.save_retain_interval, "--save", checkpoint.save),
        ("--async-save", checkpoint.async_save, "--save", checkpoint.save),
        ("--save-trained-only", checkpoint.save_trained_only, "--save", checkpoint.save),
        ("--load-fallback", checkpoint.load_fallback, "--load", checkpoint.load),
        ("--exit-on-missing-checkpoint", checkpoint.exit_on_missing_checkpoint, "--load", checkpoint.load),
        ("--finetune", checkpoint.finetune, "--load", checkpoint.load),
        ("--override-opt-param-scheduler", checkpoint.override_opt_param_scheduler, "--load", checkpoint.load),
        (
            "--use-checkpoint-opt-param-scheduler",
            checkpoint.use_checkpoint_opt_param_scheduler,
            "--load",
            checkpoint.load,
        ),
        ("--save-hf-interval", checkpoint.save_hf_interval, "--save-hf", checkpoint.save_hf),
        ("--save-dtype", checkpoint.save_dtype, "--save-hf", checkpoint.save_hf),
        ("--keep-source-tokenizer", checkpoint.keep_source_tokenizer, "--save-hf", checkpoint.save_hf),
        ("--wandb-exp-name", logging.wandb_exp_name, "--wandb-project", logging.wandb_project),
    )
    if not checkpoint.load_optim and checkpoint.load is None:
        raise UserError("--no-load-optim needs --load; add it or leave --no-load-optim out.")
    for option, value, needed, needed_value in needs:
        if value not in (None, False) and needed_value is None:
            given = option if value is True else f"{option} {value}"
            raise UserError(f"{given} needs {needed}; add it or leave {option} out.")


def outputs_can_be_written(config: RunConfig, shape: ModelShape | None, world_size: int) -> None:
    """Find before the training what would fail after it: a folder that cannot be written, a missing package."""
    if config.checkpoint.save is not None and find_spec("psutil") is None:
        # megatron-core's writer process would die without it, and the trainer wait for it for ever.
        raise UserError(
            f"--save {config.checkpoint.save} needs the package psutil, which is not installed; "
            "run `pip install psutil`, or leave --save out."
        )
    outputs = config.checkpoint
    for option, path in (("--save", outputs.save), ("--save-hf", outputs.save_hf), ("--save-lora", outputs.save_lora)):
        if path is None:
            continue
        nearest = next(folder for folder in (Path(path).resolve(), *Path(path).resolve().parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(
                f"{option} {path} cannot be written: {nearest} is not a folder that this user may write to; choose "
                f"another folder."
            )


def load_is_the_folder_of_a_run(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """--load names the folder of a run, or one that may become it; a folder without checkpoints starts a fresh run."""
    if config.checkpoint.load is None:
        return
    path = Path(config.checkpoint.load)
    if path.exists() and not path.is_dir():
        raise UserError(f"--load {path} is a file; give the --save folder of a run.")
    if path.name.startswith("iter_") and (path / "metadata.json").exists():
        raise UserError(
            f"--load {path} is a single checkpoint; give the folder of its run, {path.parent}, whose newest checkpoint "
            f"is loaded."
        )
    if (path / HF_CONFIG_FILE).exists():
        raise UserError(
            f"--load {path} is a Hugging Face folder; give it as --load-hf (--load takes the --save folder of a run)."
        )


def a_new_run_has_its_own_folder(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """--finetune begins at iteration 0, so in the old run's folder it would replace its checkpoints."""
    checkpoint = config.checkpoint
    if checkpoint.finetune and checkpoint.save is not None and same_folder(checkpoint.save, checkpoint.load):
        raise UserError(
            f"--finetune starts a new run, but --save {checkpoint.save} is the folder of the run it starts from; "
            f"choose another --save folder, or leave --finetune out to resume that run."
        )


def one_schedule_is_chosen(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A resumed run follows its checkpoint's schedule or the command's."""
    checkpoint = config.checkpoint
    if checkpoint.override_opt_param_scheduler and checkpoint.use_checkpoint_opt_param_scheduler:
        raise UserError(
            "--override-opt-param-scheduler uses this command's schedule, but --use-checkpoint-opt-param-scheduler the "
            "checkpoint's; keep one of them."
        )


def kept_checkpoints_exist(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A retain interval that no save falls on would keep nothing, in silence."""
    retain, interval = config.checkpoint.save_retain_interval, config.checkpoint.save_interval
    if retain is not None and interval is not None and retain % interval:
        raise UserError(
            f"--save-retain-interval {retain} must be a multiple of --save-interval {interval}, such as "
            f"{max(1, round(retain / interval)) * interval}: only saved iterations can be kept."
        )
