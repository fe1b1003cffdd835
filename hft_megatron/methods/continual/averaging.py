"""Each task's result averaged with the model before it: weight averaging along a sequence.

With coefficient c the model after a task is c W + (1 - c) W', weight by weight, where W' is the model that the task's
training started from and W its result (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903, at every task).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from hft_megatron.checkpoint.store import set_masters_from_weights
from hft_megatron.evaluation.weight_changes import UnitWeights
from hft_megatron.model.parameters import local_slice, parameter_slots
from hft_megatron.trainer.loop import Hook
from hft_megatron.trainer.run import Run


@dataclass
class AverageWithBefore(Hook):
    """Averages after the last step, before the last checkpoint, which then holds the average."""

    coefficient: float
    before: Callable[[], AbstractContextManager[UnitWeights]]
    """The weights that the stage started from, one unit at a time in memory."""

    def at_round_start(self, run: Run) -> None:
        if not run.is_complete:
            # Not read yet: missing weights are an error now, and not when the task's last step is done.
            self.before()

    def after_iteration(self, run: Run) -> None:
        if run.is_complete:
            self._average(run)

    def _average(self, run: Run) -> None:
        run.announce(f"> averaging: {self.coefficient:g} of this task's weights and the rest from those before it")
        with run.wrapped.gathered_parameters(), self.before() as start, torch.no_grad():
            for slot in parameter_slots(run.wrapped.modules):
                held = slot.parameter
                earlier = local_slice(start.read(slot.unit), slot, run.placement).to(held)
                # Frozen weights stay to the last bit, which the sum of two parts of them might not.
                if not torch.equal(held, earlier):
                    held.copy_(torch.lerp(earlier.float(), held.float(), self.coefficient))
            set_masters_from_weights(run.wrapped)
