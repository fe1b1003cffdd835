"""Rules about --save-hf and the exports during training.

Every rule takes (options, shape, world size) and raises UserError with one sentence; ``validation`` runs them.
"""

from collections.abc import Callable
from pathlib import Path

from hft_megatron.config.export_folder import ExportFolder
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.names import MethodName
from hft_megatron.config.run_folder import RUN_IDENTITY_FILE
from hft_megatron.config.run_identity import RunIdentity
from hft_megatron.config.schema import CheckpointConfig, RunConfig
from hft_megatron.errors import UserError

_LOSS = {"lm loss": False}
BEST_METRICS: dict[MethodName, dict[str, bool]] = {
    "sft": _LOSS,
    "pretrain": _LOSS,
    "dpo": {"preference loss": False, "rewards/accuracies": True, "rewards/margins": True},
}
"""What --save-hf-best can go by: names of the log, and whether higher is better."""
_OF_VALIDATION = " validation"
"""Behind such a name in metrics.jsonl; may be given or left out."""


def best_metric(checkpoint: CheckpointConfig) -> str | None:
    """The metric of --save-hf-best by its name in the log."""
    return None if checkpoint.save_hf_best is None else checkpoint.save_hf_best.removesuffix(_OF_VALIDATION)


def higher_is_better(metric: str) -> bool:
    """Whether the best export has the highest value of a metric of ``BEST_METRICS``."""
    return any(metrics.get(metric, False) for metrics in BEST_METRICS.values())


def exports_fit_the_run(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Options of exports during training need training, an interval, and a validation to choose by at each of them."""
    checkpoint, interval = config.checkpoint, config.checkpoint.save_hf_interval
    for option, value in (("--save-hf-keep", checkpoint.save_hf_keep), ("--save-hf-best", checkpoint.save_hf_best)):
        if value is not None and interval is None:
            raise UserError(f"{option} {value} needs --save-hf-interval; add it or leave {option} out.")
    if interval is None:
        return
    if config.training.train_iters == 0:
        raise UserError(
            f"--save-hf-interval {interval} exports during training, and --train-iters 0 trains nothing; leave one of "
            f"them out."
        )
    if checkpoint.save_hf_best is None:
        return
    every = config.logging.eval_interval
    if every is None:
        raise UserError(
            f"--save-hf-best {checkpoint.save_hf_best} needs --eval-interval, whose validations it chooses by; add it, "
            f"such as --eval-interval {interval}."
        )
    if interval % every:
        raise UserError(
            f"--save-hf-interval {interval} must be a multiple of --eval-interval {every}, such as "
            f"{max(1, round(interval / every)) * every}: --save-hf-best needs a validation at every export."
        )


def best_is_measured_by(method: MethodName) -> Callable[[RunConfig, ModelShape, int], None]:
    """The rule that validation of ``method`` measures what --save-hf-best goes by."""

    def best_is_measured(config: RunConfig, shape: ModelShape, world_size: int) -> None:
        metric, known = best_metric(config.checkpoint), BEST_METRICS[method]
        if metric is not None and metric not in known:
            raise UserError(
                f"--save-hf-best {config.checkpoint.save_hf_best} is no validation metric of {method} to choose by; "
                f"there {'is' if len(known) == 1 else 'are'}: {', '.join(known)}."
            )

    return best_is_measured


def check_filled_export_folder(config: RunConfig) -> None:
    """UserError for a --save-hf folder that holds something, unless a run in --save left only its own exports there.

    The final export may be there where it is of the iteration that this command ends at.
    """
    checkpoint = config.checkpoint
    assert checkpoint.save_hf is not None
    folder = ExportFolder(Path(checkpoint.save_hf))
    noted = None if checkpoint.save_hf_interval is None else folder.noted()
    if noted is None or folder.strangers():
        raise UserError(f"--save-hf {folder.path} is not empty; choose a new folder, or empty this one.")
    # Not those that are noted: a run that goes back leaves later ones unnoted until it comes to them again.
    if noted.run != _run_in(checkpoint.save) and (noted.final_files or any(folder.iteration_folders())):
        raise UserError(
            f"--save-hf {folder.path} holds exports of another run than --save {checkpoint.save}; choose a new folder, "
            f"or empty this one."
        )
    if folder.has_final() and config.training.train_iters not in (None, noted.final_iteration):
        raise UserError(
            f"--save-hf {folder.path} holds the final export of this run, of iteration {noted.final_iteration}; choose "
            f"a new folder for that of iteration {config.training.train_iters}."
        )


def _run_in(save: str | None) -> str | None:
    if save is None or not (Path(save) / RUN_IDENTITY_FILE).exists():
        return None
    return RunIdentity.read("--save", save).run_id
