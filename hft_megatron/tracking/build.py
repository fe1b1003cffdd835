"""Decides which trackers a run has, from its options."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hft_megatron.config.schema import LoggingConfig
from hft_megatron.errors import UserError
from hft_megatron.tracking.console import ConsoleTracker
from hft_megatron.tracking.jsonl import FILE_NAME, JsonlTracker
from hft_megatron.tracking.tensorboard import TensorBoardTracker
from hft_megatron.tracking.tracker import CompositeTracker, Tracker
from hft_megatron.tracking.wandb_tracker import WandbTracker


def check_tracking_packages(logging: LoggingConfig) -> None:
    """Raise ``UserError`` when an option asks for a package that is not installed; the same on every rank."""
    for option, value, package in (
        ("--tensorboard-dir", logging.tensorboard_dir, "tensorboard"),
        ("--wandb-project", logging.wandb_project, "wandb"),
    ):
        if value is not None and find_spec(package) is None:
            raise UserError(f"{option} {value} needs the package {package}: run `pip install {package}`.")


def build_tracker(
    logging: LoggingConfig,
    *,
    save: str | None,
    train_iters: int,
    start_iteration: int,
    resolved_config: Mapping[str, Any],
    is_writer: bool,
) -> CompositeTracker:
    """The trackers of this rank: on the writing rank the console, metrics.jsonl (with --save) and what was asked for.

    ``start_iteration`` is the last iteration of the loaded checkpoint, 0 for a fresh run. ``resolved_config`` is what
    wandb shows as the run's options; it must hold options only, nothing from the environment. Raises ``UserError`` on
    every rank when a package is missing.
    """
    check_tracking_packages(logging)
    if not is_writer:
        return CompositeTracker()
    trackers: list[Tracker] = []
    if save is not None:
        trackers.append(JsonlTracker(Path(save) / FILE_NAME, start_iteration=start_iteration))
    if logging.tensorboard_dir is not None:
        trackers.append(TensorBoardTracker(logging.tensorboard_dir, start_iteration=start_iteration))
    if logging.wandb_project is not None:
        trackers.append(
            WandbTracker(
                project=logging.wandb_project, name=logging.wandb_exp_name, folder=save, config=resolved_config
            )
        )
    # Last, so that no bar stands on the screen when another tracker refuses.
    trackers.append(ConsoleTracker(train_iters=train_iters, start_iteration=start_iteration))
    return CompositeTracker(trackers=tuple(trackers))
