"""Rules about where things come from and go to: model, tokenizer, data, folders, dashboards.

Every rule takes (options, shape, world size) and raises UserError with one sentence; ``validation`` runs them.
They look at folders but read no data: the data's own mistakes are found by the part that reads it.
"""

import os
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from hft_megatron.config.data_sources import check_record_options, check_sources
from hft_megatron.config.export_rules import check_filled_export_folder
from hft_megatron.config.model_shape import HF_CONFIG_FILE, ModelShape
from hft_megatron.config.names import SELECTIONS
from hft_megatron.config.run_folder import CHECKPOINT_TRACKER_FILE, same_folder
from hft_megatron.config.schema import DataConfig, ModelConfig, RunConfig
from hft_megatron.errors import UserError

_ALLOWED_WITH_LOAD_HF = ("load_hf", "make_vocab_size_divisible_by")


def model_is_given_once(config: ModelConfig) -> None:
    """A model folder, or a shape; with both, one of them would be ignored in silence."""
    if config.load_hf is None:
        if all(getattr(config, field.name) == field.default for field in fields(config)):
            raise UserError("No model is given: name a folder with --load-hf, or a shape with --num-layers and so on.")
        return
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in _ALLOWED_WITH_LOAD_HF and value != field.default:
            flag = "--" + field.name.replace("_", "-")
            raise UserError(f"{flag} {value} cannot be given with --load-hf, whose config.json sets it; leave it out.")


def training_data_is_given(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Training needs text; --train-iters 0 only converts."""
    if config.training.train_iters != 0 and not config.data.train_data_path:
        raise UserError("--train-data-path is missing: give a data file, or --train-iters 0 to train nothing.")


def tokenizer_is_given(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Every model needs its tokenizer."""
    if config.data.tokenizer_model is None and config.model.load_hf is None:
        raise UserError("--tokenizer-model is missing: a model that is not read by --load-hf brings no tokenizer.")


def data_sources_are_clear(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Weights stand before paths, for all or none; validation, which sees every example once, has none. What is said
    about the keys of records has a meaning."""
    check_sources(config.data)
    check_record_options(config.data)


def packing_is_asked_for(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Options about packs do nothing where nothing is packed."""
    if config.data.packing:
        return
    for field in fields(DataConfig):
        value = getattr(config.data, field.name)
        if field.name.startswith("packing_") and value != field.default:
            flag = "--" + field.name.replace("_", "-")
            raise UserError(f"{flag} {value} needs --packing; add it or leave {flag} out.")


def validation_has_data(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Asking for validation without data to validate on is a forgotten option."""
    for name in ("eval_interval", "eval_iters"):
        value = getattr(config.logging, name)
        if value is not None and not config.data.valid_data_path:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value} needs --valid-data-path; add it or leave {flag} out.")


def nothing_is_overwritten(config: RunConfig, shape: ModelShape | None, world_size: int) -> None:
    """Folders that hold a run or a model are never written over unasked."""
    checkpoint = config.checkpoint
    if checkpoint.save is not None and not _can_be_folder(checkpoint.save):
        raise UserError(f"--save {checkpoint.save} is a file, not a folder; choose another folder.")
    if checkpoint.save_hf is not None:
        target = Path(checkpoint.save_hf)
        if target.resolve() == Path.cwd():
            raise UserError(
                "--save-hf . is the folder you are in; name a new folder, which appears when it is complete."
            )
        if not _can_be_folder(checkpoint.save_hf):
            raise UserError(f"--save-hf {checkpoint.save_hf} is a file, not a folder; choose another folder.")
        if target.is_dir() and any(target.iterdir()):
            check_filled_export_folder(config)
    if checkpoint.save is None or same_folder(checkpoint.save, checkpoint.load) or checkpoint.finetune:
        return
    saved = Path(checkpoint.save)
    if (saved / CHECKPOINT_TRACKER_FILE).exists() or any(path.name[5:].isdecimal() for path in saved.glob("iter_*")):
        raise UserError(
            f"--save {checkpoint.save} already holds checkpoints of a run; add --load {checkpoint.save} to go on "
            f"with it, or choose another folder."
        )


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
    for option, value, needed, needed_value in needs:
        if value not in (None, False) and needed_value is None:
            given = option if value is True else f"{option} {value}"
            raise UserError(f"{given} needs {needed}; add it or leave {option} out.")


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


def scores_are_of_the_first_weights(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Spectrum scores the --load-hf folder's weights, and --finetune starts from others."""
    if config.checkpoint.finetune and SELECTIONS[config.hft.hft_selection].needs_scores:
        raise UserError(
            f"--hft-selection {config.hft.hft_selection} scores the weights of --load-hf, and --finetune starts from "
            f"those of --load {config.checkpoint.load}; export that run with --save-hf and give the folder as "
            "--load-hf instead."
        )


def a_new_run_has_its_own_folder(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """--finetune begins at iteration 0: in the old run's folder it would take the place of its checkpoints."""
    checkpoint = config.checkpoint
    if checkpoint.finetune and checkpoint.save is not None and same_folder(checkpoint.save, checkpoint.load):
        raise UserError(
            f"--finetune starts a new run, and --save {checkpoint.save} is the folder of the run it starts from; "
            f"choose another --save folder, or leave --finetune out to go on with that run."
        )


def outputs_can_be_written(config: RunConfig, shape: ModelShape | None, world_size: int) -> None:
    """What would fail only after the training is found now: a folder that can't be written, a package that is gone."""
    if config.checkpoint.save is not None and find_spec("psutil") is None:
        # megatron-core's writer process would die without it, and the trainer wait for it for ever.
        raise UserError(
            f"--save {config.checkpoint.save} needs the package psutil, which is not installed; "
            "run `pip install psutil`, or leave --save out."
        )
    for option, path in (("--save", config.checkpoint.save), ("--save-hf", config.checkpoint.save_hf)):
        if path is None:
            continue
        nearest = next(folder for folder in (Path(path).resolve(), *Path(path).resolve().parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(
                f"{option} {path} can't be written: {nearest} is not a folder this user may write to; choose another."
            )


def _can_be_folder(path: str) -> bool:
    return Path(path).is_dir() or not Path(path).exists()
