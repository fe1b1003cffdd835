"""What can happen around the steps of a run."""

from hft_megatron.training.run import Run
from hft_megatron.training.step import StepResult


class Hook:
    """Runs on every rank, at the points that it overrides."""

    def at_round_start(self, run: Run) -> None:
        """Before the first step, and after every switch to another round."""

    def after_step(self, run: Run, result: StepResult) -> None:
        """After every optimizer step."""

    def at_round_end(self, run: Run) -> None:
        """Before every switch to another round, and after the last step."""

    def at_end(self, run: Run) -> None:
        """After the last step."""
