"""--hft-audit: resting shards must keep their bits."""

from dataclasses import dataclass

from hft_megatron.hft.audit import Audit
from hft_megatron.model.parameters import parameter_slots
from hft_megatron.training.hook import Hook
from hft_megatron.training.run import Run
from hft_megatron.training.step import StepResult


@dataclass
class AuditRounds(Hook):
    """Verifies that resting shards keep their bits: at the end of every round, and every ``interval`` steps."""

    interval: int | None
    _audit: Audit | None = None

    def at_round_start(self, run: Run) -> None:
        self._audit = Audit(list(parameter_slots(run.wrapped.modules)), run.wrapped.plan)

    def after_step(self, run: Run, result: StepResult) -> None:
        if self.interval is not None and run.state.iteration % self.interval == 0:
            self.verify(run)

    def at_round_end(self, run: Run) -> None:
        self.verify(run)
        run.announce(f"audit of round {run.state.round}: every resting shard has the bits it had at its start")

    def verify(self, run: Run) -> None:
        """Raises RunFailed on every rank when a resting shard has changed."""
        assert self._audit is not None
        self._audit.verify(coordinates=run.placement.coordinates)
