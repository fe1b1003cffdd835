"""``hft-megatron sft``: supervised fine-tuning, and conversion when --train-iters is 0.

Run: ``torchrun --nproc-per-node 2 -m hft_megatron sft --load-hf MODEL --train-data-path DATA --save RUN``.
"""

from dataclasses import dataclass, field, replace

from hft_megatron.cli.boundary import StatusFolder
from hft_megatron.cli.training_command import TrainingOptions, run_method
from hft_megatron.config.schema import DataConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class SftOptions(TrainingOptions):
    """The options of a fine-tuning."""

    data: DataConfig = field(default_factory=DataConfig)

    @property
    def as_run(self) -> RunConfig:
        return replace(super().as_run, data=self.data)


def run(options: SftOptions, status: StatusFolder) -> None:
    """Check, and train unless only the check is asked for."""
    run_method("sft", options, status)
