"""``hft-megatron pretrain``: pre-training on Megatron's .bin and .idx files, from random weights or a model's.

Run: ``torchrun --nproc-per-node 2 -m hft_megatron pretrain --load-hf MODEL --data-path PREFIX --save RUN``.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from hft_megatron.cli.boundary import StatusFolder
from hft_megatron.cli.training_command import TrainingOptions, run_method
from hft_megatron.config.schema import CorpusConfig, DataConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class PretrainTokenizerConfig:
    """What of a run's data options has a meaning here: the corpus holds ids already."""

    tokenizer_type: Literal["HuggingFaceTokenizer", "SentencePieceTokenizer"] | None = None
    """Found from the files when unset."""
    tokenizer_model: str | None = None
    """The one that the corpus was made with, which an export gets too; the --load-hf folder when unset."""


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(TrainingOptions):
    """The options of a pre-training."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: PretrainTokenizerConfig = field(default_factory=PretrainTokenizerConfig)

    @property
    def as_run(self) -> RunConfig:
        data = DataConfig(tokenizer_type=self.tokenizer.tokenizer_type, tokenizer_model=self.tokenizer.tokenizer_model)
        return replace(super().as_run, data=data, corpus=self.corpus)


def run(options: PretrainOptions, status: StatusFolder) -> None:
    """Check, and train unless only the check is asked for."""
    run_method("pretrain", options, status)
