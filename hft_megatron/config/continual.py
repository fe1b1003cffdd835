"""Options of a sequence of tasks, and the rules that tie them to the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from hft_megatron.config.lora import LoraConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.errors import UserError

Setting = Literal["sequential", "joint", "single"]
Evaluated = Literal["seen", "all", "last"]


@dataclass(frozen=True, kw_only=True)
class ContinualConfig:
    """Which tasks are learned in which order, and what is measured after each."""

    continual_tasks: str | None = None
    """TRACE's folder (one folder for each task, with train.json and test.json), or a YAML list of tasks, each with a
    `name`, options of its training such as `train_data_path`, `train_epochs` and `lr`, and `evaluate`, a task of
    `hft-megatron evaluate`."""
    continual_order: tuple[str, ...] = ()
    """Names of the tasks to learn, in this order; all of them, as the file or TRACE has them, when unset."""
    continual_setting: Setting = "sequential"
    """One task after the other; or, as bounds, the data of all tasks at once (joint), and a model for each task from
    the first weights (single)."""
    continual_schedule: Literal["restart", "continue"] = "restart"
    """A warm-up and decay for each task, or one over the iterations of all tasks, in which each goes on where the one
    before ended. What becomes of moments, --hft-moments says."""
    continual_evaluate: Evaluated = "seen"
    """After each task put the tasks learned so far to the model, or all tasks, or (last) all after the last task
    alone. The untrained model gets all tasks, too, but for `last`."""
    continual_general: str | None = None
    """YAML file of evaluation tasks beside the sequence: general abilities and texts, before the first task and after
    each."""
    continual_kl_to_base: bool = False
    """Measure the KL divergences between the --load-hf model and the tuned one on the texts of --continual-general,
    too. Those weights are in memory a second time while the texts are read."""
    continual_batch_size: Annotated[int, Ge(1)] = 16
    """Sequences of an evaluation task that a data-parallel replica reads at once."""
    continual_average: Annotated[float, Gt(0), Lt(1)] | None = None
    """Average each task's result with the model before it: so much of the task's weights, the rest of those it started
    from."""
    continual_discard: bool = False
    """Delete a task's checkpoints when the one after it is trained and evaluated; those of the last task stay. Log,
    bill and metrics stay of all, and finished.json says how far a task came."""
    replay_ratio: Annotated[float, Gt(0), Le(1)] | None = None
    """Train a share of every earlier task's training data again with each task, drawn by --seed."""
    replay_data_path: tuple[str, ...] = ()
    """Other data that is trained with what is replayed, all of it with every task, such as TRACE's Lima."""
    replay_phase: Literal["mixed", "after"] = "mixed"
    """Replay among a task's own examples, or after them as a phase of one epoch, as TRACE does."""


def sequence_fits_the_run(options: ContinualConfig, config: RunConfig) -> None:
    """Raise UserError for options of a sequence that are missing, or that contradict each other or the run's."""
    if options.continual_tasks is None:
        raise UserError("--continual-tasks is missing: name TRACE's folder, or a YAML list of tasks.")
    if config.checkpoint.save is None:
        raise UserError("--save is missing: a sequence of tasks hands its weights on, and its scores, in that folder.")
    if config.data.train_data_path:
        raise UserError(
            f"--train-data-path {' '.join(config.data.train_data_path)} is not read: each of --continual-tasks has its "
            f"own data; leave it out."
        )
    if config.hft.hft_first_round is not None:
        raise UserError(f"--hft-first-round {config.hft.hft_first_round}: a sequence numbers its rounds; leave it out.")
    if options.continual_kl_to_base and (options.continual_general is None or config.model.load_hf is None):
        needed = "--continual-general" if options.continual_general is None else "--load-hf"
        raise UserError(
            f"--continual-kl-to-base compares the --load-hf model with the tuned one on texts of --continual-general, "
            f"and there is no {needed}; add it, or leave --continual-kl-to-base out."
        )
    replays = options.replay_ratio is not None or options.replay_data_path
    if options.replay_phase == "after" and not replays:
        raise UserError("--replay-phase after needs --replay-ratio or --replay-data-path; add one, or leave it out.")
    if replays and options.continual_setting != "sequential":
        given = f"--replay-ratio {options.replay_ratio}" if options.replay_ratio else "--replay-data-path"
        raise UserError(
            f"{given} is about tasks that came before, and --continual-setting {options.continual_setting} has none; "
            f"leave one of them out."
        )
    if options.continual_schedule == "continue":
        _one_schedule_fits(options, config)
    if options.continual_average is not None and config.model.load_hf is None:
        raise UserError(
            f"--continual-average {options.continual_average} needs --load-hf: the first task's result is averaged "
            f"with that model."
        )
    if options.continual_average is not None and options.continual_setting != "sequential":
        raise UserError(
            f"--continual-average {options.continual_average} is about the model before a task, and "
            f"--continual-setting {options.continual_setting} has none; leave one of them out."
        )
    if options.continual_average is not None and config.hft.hft_round_interval != "stage":
        raise UserError(
            f"--continual-average {options.continual_average} would change weights that rest in a task's last round, "
            f"with --hft-round-interval {config.hft.hft_round_interval}; give each task one round (stage)."
        )
    if options.continual_average is not None and config.lora != LoraConfig():
        raise UserError(
            f"--continual-average {options.continual_average} averages the model's weights, and with --lora-rank these "
            f"are frozen; leave one of the two out."
        )
    if options.continual_discard:
        _discarding_fits(options, config)
    twice = [name for name in options.continual_order if options.continual_order.count(name) > 1]
    if twice:
        raise UserError(f"--continual-order names {twice[0]} twice; a task is learned once.")


def _one_schedule_fits(options: ContinualConfig, config: RunConfig) -> None:
    """One schedule has tasks that follow one another, and a length that no layout changes."""
    if options.continual_setting != "sequential":
        raise UserError(
            f"--continual-schedule continue is about tasks that follow one another, and --continual-setting "
            f"{options.continual_setting} has none; leave one of them out."
        )
    if config.hft.hft_lr_schedule == "round":
        raise UserError(
            "--continual-schedule continue has one schedule for all rounds, and --hft-lr-schedule round one for each; "
            "leave one of them out."
        )
    optimizer = config.optimizer
    if optimizer.lr_schedule_iters is not None or optimizer.lr_schedule_start:
        raise UserError("--lr-schedule-iters and --lr-schedule-start are what a sequence sets itself; leave them out.")


def _discarding_fits(options: ContinualConfig, config: RunConfig) -> None:
    """What is deleted must be needed by nothing that stays."""
    if config.checkpoint.save_trained_only:
        raise UserError(
            "--continual-discard deletes the checkpoints of earlier tasks, and those of --save-trained-only need the "
            "ones before them; leave one of the two out."
        )
    if options.continual_setting == "joint":
        raise UserError(
            "--continual-discard is about tasks that came before, and --continual-setting joint has none; leave one of "
            "them out."
        )
