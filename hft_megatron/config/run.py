"""The options of a run: one group for each part, as frozen dataclasses. Field names are Megatron's flags.

Imports neither torch nor megatron, so that a wrong option is reported in milliseconds.
"""

from dataclasses import dataclass, field

from hft_megatron.config.checkpoint import CheckpointConfig
from hft_megatron.config.corpus import CorpusConfig
from hft_megatron.config.data import DataConfig
from hft_megatron.config.dpo import DpoConfig
from hft_megatron.config.ewc import EwcConfig
from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.lora import LoraConfig
from hft_megatron.config.model import ModelConfig
from hft_megatron.config.objectives import ObjectivesConfig
from hft_megatron.config.optimizer import OptimizerConfig
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.tracking import LoggingConfig
from hft_megatron.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. On the command line the groups are flat: ``--lr``, not ``--optimizer.lr``."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    ewc: EwcConfig = field(default_factory=EwcConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    hft: HFTConfig = field(default_factory=HFTConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
