"""Rules about --save-hf, the exports during training, and folders that are never written over.

Every rule takes (options, shape, world size) and raises UserError with one sentence; ``validation`` runs them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from hft_megatron.config.checkpoint import CheckpointConfig
from hft_megatron.config.derived import known_train_iters
from hft_megatron.config.export_folder import ExportFolder
from hft_megatron.config.lora import AdapterNote
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.names import MethodName
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import CHECKPOINT_TRACKER_FILE, RUN_IDENTITY_FILE, same_folder
from hft_megatron.config.run_identity import RunIdentity
from hft_megatron.errors import UserError

BEST_METRICS: dict[MethodName, Mapping[str, bool]] = {}
"""Metrics of --save-hf-best, by method: names of the log, and whether higher is better. Filled by
``methods.registry``."""

_OF_VALIDATION = " validation"
"""Suffix of such a name in metrics.jsonl; may be given or left out."""


def best_metric(checkpoint: CheckpointConfig) -> str | None:
    """The metric of --save-hf-best by its name in the log."""
    return None if checkpoint.save_hf_best is None else checkpoint.save_hf_best.removesuffix(_OF_VALIDATION)


def higher_is_better(metric: str) -> bool:
    """Return whether the best export has the highest value of a metric of ``BEST_METRICS``."""
    return any(metrics.get(metric, False) for metrics in BEST_METRICS.values())


def exports_fit_the_run(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Options of exports during training need training, an interval, and a validation at each export to choose by."""
    checkpoint, interval = config.checkpoint, config.checkpoint.save_hf_interval
    for option, value in (("--save-hf-keep", checkpoint.save_hf_keep), ("--save-hf-best", checkpoint.save_hf_best)):
        if value is not None and interval is None:
            raise UserError(f"{option} {value} needs --save-hf-interval; add it or leave {option} out.")
    if interval is None:
        return
    if config.training.train_iters == 0:
        raise UserError(
            f"--save-hf-interval {interval} exports during training, but --train-iters 0 trains nothing; leave one of "
            f"them out."
        )
    if checkpoint.save_hf_best is None:
        return
    every = config.logging.eval_interval
    if every is None:
        raise UserError(
            f"--save-hf-best {checkpoint.save_hf_best} needs validations to choose by; add --eval-interval, such as "
            f"--eval-interval {interval}."
        )
    if interval % every:
        raise UserError(
            f"--save-hf-interval {interval} must be a multiple of --eval-interval {every}, such as "
            f"{max(1, round(interval / every)) * every}: --save-hf-best needs a validation at every export."
        )


def best_is_measured_by(method: MethodName) -> Callable[[RunConfig, ModelShape, int], None]:
    """The rule that validation of ``method`` measures the metric of --save-hf-best."""

    def best_is_measured(config: RunConfig, shape: ModelShape, world_size: int) -> None:
        metric, known = best_metric(config.checkpoint), BEST_METRICS[method]
        if metric is not None and metric not in known:
            choose = f"choose {' or '.join(known)}" if known else "it has none; leave --save-hf-best out"
            raise UserError(
                f"--save-hf-best {config.checkpoint.save_hf_best} is not a validation metric of {method}; {choose}."
            )

    return best_is_measured


def check_filled_export_folder(config: RunConfig) -> None:
    """Raise UserError for a --save-hf folder that is not empty, unless it holds only exports of the run in --save.

    The final export may be there where it is of the iteration that this command ends at.
    """
    checkpoint = config.checkpoint
    assert checkpoint.save_hf is not None
    folder = ExportFolder(Path(checkpoint.save_hf))
    noted = folder.noted()
    if noted is None or folder.strangers():
        raise UserError(f"--save-hf {folder.path} is not empty; choose a new folder, or empty this one.")
    # All folders, not just the recorded ones: a run that resumes earlier leaves later exports unrecorded meanwhile.
    if noted.run != run_in(checkpoint.save) and (noted.final_files or any(folder.iteration_folders())):
        raise UserError(
            f"--save-hf {folder.path} holds exports of a run other than the one in --save {checkpoint.save}; choose a "
            f"new folder, or empty this one."
        )
    last = known_train_iters(config.training)
    if folder.has_final() and last not in (None, noted.final_iteration):
        raise UserError(
            f"--save-hf {folder.path} already holds the final export of this run, of iteration "
            f"{noted.final_iteration}; choose a new folder for the export of iteration {last}."
        )


def run_in(save: str | None) -> str | None:
    """``RunIdentity.run_id`` of the run in a --save folder; None where there is none."""
    if save is None or not (Path(save) / RUN_IDENTITY_FILE).exists():
        return None
    return RunIdentity.read("--save", save).run_id


def check_adapter_folder(config: RunConfig) -> None:
    """UserError for a --save-lora folder that is shared with other outputs, or that is not empty, unless it holds the
    adapter of the run in --save at the iteration that this command ends at."""
    checkpoint = config.checkpoint
    if checkpoint.save_lora is None:
        return
    given, target = f"--save-lora {checkpoint.save_lora}", Path(checkpoint.save_lora).resolve()
    if target == Path.cwd():
        raise UserError(
            f"{given} is the current folder; name a new folder, which appears when the adapter is complete."
        )
    for option, path in (("--save-hf", checkpoint.save_hf), ("--save", checkpoint.save)):
        other = None if path is None else Path(path).resolve()
        if other is not None and (target == other or target in other.parents or other in target.parents):
            raise UserError(
                f"{given} and {option} {path} are the same folder, or one is inside the other; separate them."
            )
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    noted = AdapterNote.read(target)
    if noted is None or noted.run != run_in(checkpoint.save):
        raise UserError(f"{given} already exists; choose a new folder, or remove this one.")
    last = known_train_iters(config.training)
    if last not in (None, noted.iteration):
        raise UserError(
            f"{given} already holds the adapter of this run, of iteration {noted.iteration}; choose a new folder for "
            f"the adapter of iteration {last}."
        )


def nothing_is_overwritten(config: RunConfig, shape: ModelShape | None, world_size: int) -> None:
    """Folders that hold a run or a model are never overwritten."""
    checkpoint = config.checkpoint
    if checkpoint.save is not None and not _can_be_folder(checkpoint.save):
        raise UserError(f"--save {checkpoint.save} is a file, not a folder; choose another folder.")
    if checkpoint.save_hf is not None:
        target = Path(checkpoint.save_hf)
        if target.resolve() == Path.cwd():
            raise UserError(
                "--save-hf . is the current folder; name a new folder, which appears when the export is complete."
            )
        if not _can_be_folder(checkpoint.save_hf):
            raise UserError(f"--save-hf {checkpoint.save_hf} is a file, not a folder; choose another folder.")
        if target.is_dir() and any(target.iterdir()):
            check_filled_export_folder(config)
    check_adapter_folder(config)
    if checkpoint.save is None or same_folder(checkpoint.save, checkpoint.load) or checkpoint.finetune:
        return
    saved = Path(checkpoint.save)
    if (saved / CHECKPOINT_TRACKER_FILE).exists() or any(path.name[5:].isdecimal() for path in saved.glob("iter_*")):
        raise UserError(
            f"--save {checkpoint.save} already holds checkpoints of a run; add --load {checkpoint.save} to resume "
            f"it, or choose another folder."
        )


def _can_be_folder(path: str) -> bool:
    return Path(path).is_dir() or not Path(path).exists()
