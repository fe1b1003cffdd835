"""``hft-megatron dpo``: learning from preference pairs.

Run: ``torchrun --nproc-per-node 2 -m hft_megatron dpo --load-hf MODEL --train-data-path PAIRS --save RUN``.
"""

from dataclasses import dataclass, field, replace

from hft_megatron.cli.boundary import StatusFolder
from hft_megatron.cli.training_command import TrainingOptions, run_method
from hft_megatron.config.schema import DataConfig, DpoConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class DpoOptions(TrainingOptions):
    """The options of a preference tuning."""

    data: DataConfig = field(default_factory=DataConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)

    @property
    def as_run(self) -> RunConfig:
        return replace(super().as_run, data=self.data, dpo=self.dpo)


def run(options: DpoOptions, status: StatusFolder) -> None:
    """Check, and train unless only the check is asked for."""
    run_method("dpo", options, status)
