"""Options of the log, trackers, validation and profiles, and their rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Log, trackers, validation and profiles."""

    log_interval: Annotated[int, Ge(1)] = 1
    """Iterations between lines of the log."""
    tensorboard_log_interval: Annotated[int, Ge(1)] | None = None
    """Iterations between records of TensorBoard and wandb; --log-interval when unset."""
    log_params_norm: bool = False
    """Log the 2-norm of all weights, frozen ones too."""
    log_num_zeros_in_grad: bool = False
    """Log the number of zeros in the gradients of trainable weights, as megatron-core counts them."""
    timing_log_level: Literal[0, 1, 2] = 0
    """Detail of the times per iteration in the log, of the fastest and the slowest rank: 1 adds the optimizer and the
    waits for gradients and weights, 2 also forward and backward passes."""
    loss_spike_threshold: Annotated[float, Gt(0)] | None = None
    """Robust standard deviations (1.4826 times the median absolute deviation) from the median loss of the last 100
    iterations beyond which the log and the metrics mark an iteration as a spike."""
    eval_interval: Annotated[int, Ge(1)] | None = None
    """Iterations between validations; needs --valid-data-path, or --eval-iters in `pretrain`."""
    eval_iters: Annotated[int, Ge(1)] | None = None
    """Global batches per validation and source; the whole source when unset. `pretrain` does not validate on a corpus
    when unset."""
    eval_tasks: str | None = None
    """YAML file of evaluation tasks, as for `hft-megatron evaluate`. The model is evaluated on them at the end of every
    round and of the run."""
    eval_tasks_interval: Annotated[int, Ge(1)] | None = None
    """Iterations between evaluations on --eval-tasks, beside the ends of rounds; none when unset."""
    eval_tasks_batch_size: Annotated[int, Ge(1)] = 16
    """Sequences of a task that a data-parallel replica processes at once."""
    eval_on_start: bool = False
    """Validate, and evaluate on --eval-tasks, before the first step as well; recorded at iteration 0."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard's event files; none are written when unset."""
    wandb_project: str | None = None
    """Project of Weights & Biases to log to; none when unset."""
    wandb_exp_name: str | None = None
    """Name of the run in Weights & Biases; chosen by wandb when unset."""
    profile: bool = False
    """Profile a few iterations, for nsys (started with `--capture-range=cudaProfilerApi`) or with torch's profiler."""
    use_pytorch_profiler: bool = False
    """Profile with torch's profiler, which writes a trace per rank to torch_profile/ in the --save folder, or in
    --tensorboard-dir without one. Needs --profile. Always on without CUDA."""
    profile_step_start: Annotated[int, Ge(0)] = 10
    """Iterations before the first profiled one, under --profile."""
    profile_step_end: Annotated[int, Ge(1)] = 12
    """Last profiled iteration, under --profile."""
    profile_ranks: tuple[int, ...] = ()
    """Ranks to profile, under --profile; rank 0 when unset."""


def tasks_are_there(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Options of evaluation tasks come with tasks, and with a model that trains."""
    options = config.logging
    if options.eval_tasks is None:
        if options.eval_tasks_interval is not None:
            raise UserError(
                f"--eval-tasks-interval {options.eval_tasks_interval} needs --eval-tasks; add it, or leave it out."
            )
        return
    if config.training.train_iters == 0:
        raise UserError(
            f"--eval-tasks {options.eval_tasks} evaluates a model during training, but --train-iters is 0; run "
            f"`hft-megatron evaluate --model MODEL --tasks {options.eval_tasks}`."
        )


def profile_fits_the_run(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """An iteration and a rank are profiled, and traces have a folder."""
    options = config.logging
    if not options.profile:
        return
    first, last = options.profile_step_start, options.profile_step_end
    if last <= first:
        raise UserError(
            f"--profile-step-end {last} must be above --profile-step-start {first}: the first profiled iteration is "
            f"{first + 1}; give at least {first + 1}."
        )
    for rank in options.profile_ranks:
        if not 0 <= rank < world_size:
            raise UserError(f"--profile-ranks {rank}: this run has ranks 0 to {world_size - 1}; give one of them.")
    if options.use_pytorch_profiler and config.checkpoint.save is None and options.tensorboard_dir is None:
        raise UserError("--use-pytorch-profiler needs a folder for its traces; give --save or --tensorboard-dir.")
