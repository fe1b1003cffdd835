"""Options of what a person, a dashboard or a profiler sees."""

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
    """What a person or a dashboard sees."""

    log_interval: Annotated[int, Ge(1)] = 1
    tensorboard_log_interval: Annotated[int, Ge(1)] | None = None
    """Iterations between records of TensorBoard and wandb; --log-interval when unset."""
    log_params_norm: bool = False
    """Log the 2-norm of all weights, frozen ones too."""
    log_num_zeros_in_grad: bool = False
    """Log how many elements of the gradients of trainable weights are 0, as megatron-core counts them."""
    timing_log_level: Literal[0, 1, 2] = 0
    """Also log times per iteration, of the fastest and the slowest rank: 1 of the optimizer and of waits for gradients
    and weights, 2 of forward and backward passes as well."""
    loss_spike_threshold: Annotated[float, Gt(0)] | None = None
    """Mark an iteration in the log and the metrics whose loss is more than this many robust standard deviations (1.4826
    times the median absolute deviation) from the median of the last 100 iterations."""
    eval_interval: Annotated[int, Ge(1)] | None = None
    """Iterations between validations; needs --valid-data-path, or --eval-iters where a corpus is pre-trained on."""
    eval_iters: Annotated[int, Ge(1)] | None = None
    """Global batches of one validation on each source; all of it when unset, and no validation on a corpus."""
    eval_tasks: str | None = None
    """YAML file of evaluation tasks, as of `hft-megatron evaluate`: put to the model as it trains, at the end of every
    round and of the run."""
    eval_tasks_interval: Annotated[int, Ge(1)] | None = None
    """Also every so many iterations."""
    eval_tasks_batch_size: Annotated[int, Ge(1)] = 16
    """Sequences of a task that a data-parallel replica reads at once."""
    eval_on_start: bool = False
    """Validate, and put --eval-tasks to the model, before the first step, too; recorded at iteration 0."""
    tensorboard_dir: str | None = None
    wandb_project: str | None = None
    wandb_exp_name: str | None = None
    profile: bool = False
    """Profile a few iterations: for nsys (started with `--capture-range=cudaProfilerApi`), or with torch's profiler."""
    use_pytorch_profiler: bool = False
    """With --profile: torch's profiler writes a trace per rank to torch_profile/ in the --save folder, or without one
    in --tensorboard-dir. Where there is no CUDA it does so anyway."""
    profile_step_start: Annotated[int, Ge(0)] = 10
    """With --profile: iterations before the first one that is profiled."""
    profile_step_end: Annotated[int, Ge(1)] = 12
    """With --profile: the last iteration that is profiled."""
    profile_ranks: tuple[int, ...] = ()
    """With --profile: the ranks that are profiled; rank 0 when unset."""


def tasks_are_there(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Tasks are put to a model that trains, and what is said about them has some."""
    options = config.logging
    if options.eval_tasks is None:
        if options.eval_tasks_interval is not None:
            raise UserError(
                f"--eval-tasks-interval {options.eval_tasks_interval} needs --eval-tasks; add it, or leave it out."
            )
        return
    if config.training.train_iters == 0:
        raise UserError(
            f"--eval-tasks {options.eval_tasks} is for a model that trains, and --train-iters is 0; run `hft-megatron "
            f"evaluate --model MODEL --tasks {options.eval_tasks}`."
        )


def profile_fits_the_run(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Some iteration and some rank is profiled, and a trace has a place."""
    options = config.logging
    if not options.profile:
        return
    first, last = options.profile_step_start, options.profile_step_end
    if last <= first:
        raise UserError(
            f"--profile-step-end {last} must be above --profile-step-start {first}, after which the first iteration is "
            f"profiled; give at least {first + 1}."
        )
    for rank in options.profile_ranks:
        if not 0 <= rank < world_size:
            raise UserError(f"--profile-ranks {rank}: the run's ranks are 0 to {world_size - 1}; name one of them.")
    if options.use_pytorch_profiler and config.checkpoint.save is None and options.tensorboard_dir is None:
        raise UserError("--use-pytorch-profiler needs a folder for its traces; give --save or --tensorboard-dir.")
