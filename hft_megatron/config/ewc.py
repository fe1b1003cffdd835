"""Options of elastic weight consolidation, which holds on to earlier tasks while a later one is trained."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from hft_megatron.config.declared import SAME_RUN


@dataclass(frozen=True, kw_only=True)
class EwcConfig:
    """Elastic weight consolidation (EWC) from task to task."""

    ewc_lambda: Annotated[float, Ge(0), SAME_RUN] = 0.0
    """How strongly weights are held where they were after the task before, each by its Fisher information in all tasks
    so far. 0: not at all, and no Fisher information is measured."""
    ewc_batches: Annotated[int, Ge(1), SAME_RUN] = 50
    """Batches of a task, from the start of its training order, whose squared gradients are averaged for its Fisher
    information; a shorter task's are all of its own."""
