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
    """Sequence of tasks: their order, and what is measured after each."""

    continual_tasks: str | None = None
    """Tasks to learn: TRACE's folder (one folder per task, with train.json and test.json), or a YAML list of tasks,
    each with a `name`, options of its training such as `train_data_path`, `train_epochs` and `lr`, and `evaluate`, a
    task of `hft-megatron evaluate`."""
    continual_order: tuple[str, ...] = ()
    """Names of the tasks to learn, in this order; all of them, in the order of the file or of TRACE, when unset."""
    continual_setting: Setting = "sequential"
    """Setting of the tasks: one after the other (sequential); or, as bounds, the data of all tasks at once (joint), or
    one model per task, each from the first weights (single)."""
    continual_schedule: Literal["restart", "continue"] = "restart"
    """Learning rate schedule: one warm-up and decay per task (restart), or one over the iterations of all tasks, in
    which each task continues where the last one ended (continue). --hft-moments decides about the moments."""
    continual_evaluate: Evaluated = "seen"
    """Tasks that the model is evaluated on after each task: those learned so far (seen) or all; or all tasks after the
    last one only (last). The untrained model is evaluated on all tasks as well, except with `last`."""
    continual_general: str | None = None
    """YAML file of evaluation tasks beside the sequence, such as general abilities and texts; measured before the first
    task and after each task."""
    continual_kl_to_base: bool = False
    """Also measure the KL divergences between the --load-hf model and the tuned one on the texts of
    --continual-general. The --load-hf weights are then in memory as well while the texts are read."""
    continual_batch_size: Annotated[int, Ge(1)] = 16
    """Sequences of an evaluation task that a data-parallel replica processes at once."""
    continual_average: Annotated[float, Gt(0), Lt(1)] | None = None
    """Weight of a task's result in an average with the weights that the task started from; no averaging when unset."""
    continual_discard: bool = False
    """Delete a task's checkpoints once the next task is trained and evaluated; those of the last task are kept. Logs,
    bills and metrics of all tasks are kept, and finished.json records each task's last iteration."""
    replay_ratio: Annotated[float, Gt(0), Le(1)] | None = None
    """Share of every earlier task's training data to train again with each task, drawn by --seed."""
    replay_data_path: tuple[str, ...] = ()
    """Additional data to replay in full with every task, such as TRACE's Lima."""
    replay_phase: Literal["mixed", "after"] = "mixed"
    """Time of the replay: mixed among a task's own examples, or after them as a phase of one epoch, as in TRACE."""


def sequence_fits_the_run(options: ContinualConfig, config: RunConfig) -> None:
    """Raise UserError for options of a sequence that are missing, or that contradict each other or the run's."""
    if options.continual_tasks is None:
        raise UserError("--continual-tasks is missing: name TRACE's folder, or a YAML list of tasks.")
    if config.checkpoint.save is None:
        raise UserError(
            "--save is missing: a sequence of tasks keeps its scores and hands its weights on in that folder; add it."
        )
    if config.data.train_data_path:
        raise UserError(
            f"--train-data-path {' '.join(config.data.train_data_path)} would not be read: every task of "
            f"--continual-tasks has its own data; leave it out."
        )
    if config.hft.hft_first_round is not None:
        raise UserError(
            f"--hft-first-round {config.hft.hft_first_round}: a sequence of tasks numbers its own rounds; leave it out."
        )
    if options.continual_kl_to_base and (options.continual_general is None or config.model.load_hf is None):
        needed = "--continual-general" if options.continual_general is None else "--load-hf"
        raise UserError(
            f"--continual-kl-to-base compares the --load-hf model with the tuned one on texts of --continual-general, "
            f"but {needed} is not given; add it, or leave --continual-kl-to-base out."
        )
    replays = options.replay_ratio is not None or options.replay_data_path
    if options.replay_phase == "after" and not replays:
        raise UserError("--replay-phase after needs --replay-ratio or --replay-data-path; add one, or leave it out.")
    if replays and options.continual_setting != "sequential":
        given = f"--replay-ratio {options.replay_ratio}" if options.replay_ratio else "--replay-data-path"
        raise UserError(
            f"{given} replays earlier tasks, but --continual-setting {options.continual_setting} has none; "
            f"leave one of them out."
        )
    if options.continual_schedule == "continue":
        _one_schedule_fits(options, config)
    if options.continual_average is not None and config.model.load_hf is None:
        raise UserError(
            f"--continual-average {options.continual_average} needs --load-hf: the first task's result is averaged "
            f"with that model; add it."
        )
    if options.continual_average is not None and options.continual_setting != "sequential":
        raise UserError(
            f"--continual-average {options.continual_average} averages with the model before a task, but "
            f"--continual-setting {options.continual_setting} has none; leave one of them out."
        )
    if options.continual_average is not None and config.hft.hft_round_interval != "stage":
        raise UserError(
            f"--continual-average {options.continual_average} would change weights that are frozen in a task's last "
            f"round, with --hft-round-interval {config.hft.hft_round_interval}; give each task one round (stage)."
        )
    if options.continual_average is not None and config.lora != LoraConfig():
        raise UserError(
            f"--continual-average {options.continual_average} averages the model's weights, but --lora-rank freezes "
            f"them; leave one of the two out."
        )
    if options.continual_discard:
        _discarding_fits(options, config)
    twice = [name for name in options.continual_order if options.continual_order.count(name) > 1]
    if twice:
        raise UserError(f"--continual-order names {twice[0]} twice, but a task is learned once; leave one out.")


def _one_schedule_fits(options: ContinualConfig, config: RunConfig) -> None:
    """One schedule has tasks that follow one another, and a length that no layout changes."""
    if options.continual_setting != "sequential":
        raise UserError(
            f"--continual-schedule continue needs tasks that follow one another, but --continual-setting "
            f"{options.continual_setting} has none; leave one of them out."
        )
    if config.hft.hft_lr_schedule == "round":
        raise UserError(
            "--continual-schedule continue has one schedule for all rounds, but --hft-lr-schedule round has one per "
            "round; leave one of them out."
        )
    optimizer = config.optimizer
    if optimizer.lr_schedule_iters is not None or optimizer.lr_schedule_start:
        raise UserError(
            "--lr-schedule-iters and --lr-schedule-start are set by --continual-schedule continue; leave them out."
        )


def _discarding_fits(options: ContinualConfig, config: RunConfig) -> None:
    """Nothing that is kept needs a checkpoint that is deleted."""
    if config.checkpoint.save_trained_only:
        raise UserError(
            "--continual-discard deletes the checkpoints of earlier tasks, but with --save-trained-only later "
            "checkpoints need them; leave one of the two out."
        )
    if options.continual_setting == "joint":
        raise UserError(
            "--continual-discard deletes checkpoints of earlier tasks, but --continual-setting joint has none; leave "
            "one of them out."
        )
