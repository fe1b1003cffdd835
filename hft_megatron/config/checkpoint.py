"""Options of what is written and read back, and their rules, which look at folders and read no weights."""

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
    """What is written and read back."""

    save: str | None = None
    """Folder of the run: checkpoints with their plans, metrics.jsonl, the resolved config."""
    load: str | None = None
    """Folder of a run to resume from its newest complete checkpoint; without one the run starts fresh, which one line
    says. Load only folders you trust: torch reads a checkpoint's index with pickle."""
    load_fallback: bool = False
    """Where the newest checkpoint is damaged, go on from the newest good one instead of stopping."""
    exit_on_missing_checkpoint: bool = False
    """End with a mistake (exit code 2) where --load holds no checkpoint, instead of starting fresh."""
    finetune: bool = False
    """Take only the weights of --load and start a new run from them, with its own rounds, data and schedule
    (--hft-moments carry may take moments, too). Where --save holds a checkpoint of that run already, the run goes on
    from there."""
    use_checkpoint_args: bool = False
    """Take the model from the run in --load where this command names none."""
    load_optim: bool = True
    """With --no-load-optim only weights, position and data go on from --load: moments start at zero and fp32 masters
    from the weights, as at the start of a run, while the learning rate stays that of the position. --finetune does so
    anyway."""
    override_opt_param_scheduler: bool = False
    """On resume, use this command's schedule and optimizer options (--lr, --min-lr, the length of the decay,
    --weight-decay, --adam-beta1 and so on) where the checkpoint has others. That is also done without it, with a
    warning."""
    use_checkpoint_opt_param_scheduler: bool = False
    """On resume, use the checkpoint's values of those options, and its length of the decay, instead of this command's:
    a run that is made longer keeps its learning rates."""
    save_interval: Annotated[int, Ge(1)] | None = None
    """Iterations between checkpoints; the last iteration is always saved when --save is given."""
    keep_last: Annotated[int, Ge(1)] | None = None
    """Delete all but this many of the newest checkpoints after each save; all are kept when unset."""
    save_retain_interval: Annotated[int, Ge(1)] | None = None
    """Keep checkpoints at multiples of this many iterations and delete others, except the newest (or --keep-last)."""
    async_save: bool = False
    """Write checkpoints in the background while training goes on."""
    save_trained_only: bool = False
    """Leave the weights that are frozen in the round out of checkpoints: those are in the --load-hf folder or in the
    checkpoint that --finetune (or a task or stage) starts from, which must then be kept, or, from the second round on,
    in the round's first checkpoint, which is whole. All are checked when such a one is loaded."""
    save_hf: str | None = None
    """Folder to export to in Hugging Face's format at the end; adapters (--lora-rank) are added to their matrices."""
    save_lora: str | None = None
    """Folder for the adapters of --lora-rank at the end, as PEFT reads them."""
    save_hf_interval: Annotated[int, Ge(1)] | None = None
    """Iterations between exports during training, each to its own folder in --save-hf, such as iter_0000500."""
    save_hf_keep: Annotated[int, Ge(1)] | None = None
    """Delete all but this many of the newest of those, and the best; all are kept when unset."""
    save_hf_best: str | None = None
    """Metric of the validation data, such as `lm loss`, whose best export is named in exports.json and is not deleted.
    Validations must come at every export (--eval-interval)."""
    save_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Data type of all tensors in the export; each tensor's own in the source folder (or the run's) when unset."""
    keep_source_tokenizer: bool = False
    """Copy the source folder's tokenizer files to the export also where transformers makes other ids of them than were
    trained. Without it the export then has files with which it gives those; a line in the log says so."""


def outputs_have_a_place(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Options that say how something is written need the option that says where."""
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
    """What would fail only after the training is found now: a folder that can't be written, a package that is gone."""
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
                f"{option} {path} can't be written: {nearest} is not a folder this user may write to; choose another."
            )


def load_is_the_folder_of_a_run(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A folder without checkpoints starts a fresh run; what can't become a run's folder is another one by mistake."""
    if config.checkpoint.load is None:
        return
    path = Path(config.checkpoint.load)
    if path.exists() and not path.is_dir():
        raise UserError(f"--load {path} is a file; give the --save folder of a run.")
    if path.name.startswith("iter_") and (path / "metadata.json").exists():
        raise UserError(
            f"--load {path} is one checkpoint; give the folder of its run, {path.parent}, whose newest one is loaded."
        )
    if (path / HF_CONFIG_FILE).exists():
        raise UserError(f"--load {path} is a Hugging Face folder, which --load-hf takes; --load takes a run's --save.")


def a_new_run_has_its_own_folder(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """--finetune begins at iteration 0: in the old run's folder it would take the place of its checkpoints."""
    checkpoint = config.checkpoint
    if checkpoint.finetune and checkpoint.save is not None and same_folder(checkpoint.save, checkpoint.load):
        raise UserError(
            f"--finetune starts a new run, and --save {checkpoint.save} is the folder of the run it starts from; "
            f"choose another --save folder, or leave --finetune out to go on with that run."
        )


def one_schedule_is_chosen(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A resumed run follows its checkpoint's schedule or the command's."""
    checkpoint = config.checkpoint
    if checkpoint.override_opt_param_scheduler and checkpoint.use_checkpoint_opt_param_scheduler:
        raise UserError(
            "--override-opt-param-scheduler uses this command's schedule and --use-checkpoint-opt-param-scheduler the "
            "checkpoint's; keep one of them."
        )


def kept_checkpoints_exist(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A retain interval that no save falls on would keep nothing, in silence."""
    retain, interval = config.checkpoint.save_retain_interval, config.checkpoint.save_interval
    if retain is not None and interval is not None and retain % interval:
        raise UserError(
            f"--save-retain-interval {retain} must be a multiple of --save-interval {interval}, such as "
            f"{max(1, round(retain / interval)) * interval}: only iterations that are saved can be kept."
        )
