"""Options of elastic weight consolidation, which preserves earlier tasks while a later one is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from hft_megatron.config.declared import SAME_RUN
from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class EwcConfig:
    """Elastic weight consolidation (EWC) from task to task."""

    ewc_lambda: Annotated[float, Ge(0), SAME_RUN] = 0.0
    """Strength of the penalty on changes since the previous task, each weighted by the Fisher information of all tasks
    so far. 0: no penalty, and no Fisher information is measured."""
    ewc_batches: Annotated[int, Ge(1), SAME_RUN] = 50
    """Batches of a task, from the start of its training order, whose squared gradients are averaged for its Fisher
    information; all of them for a shorter task."""


def nothing_is_held(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Refuse the penalty for a method whose Fisher information is not measured."""
    if config.ewc.ewc_lambda > 0:
        raise UserError(
            f"--ewc-lambda {config.ewc.ewc_lambda:g} is for the tasks of sft; leave it out of other stages."
        )
