"""Options of what a person or a dashboard sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt


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
    """Global batches of one validation; the whole file when unset, and no validation on a corpus."""
    tensorboard_dir: str | None = None
    wandb_project: str | None = None
    wandb_exp_name: str | None = None
