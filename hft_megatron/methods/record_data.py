"""The data of a run that trains on records, whatever a method makes of them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from hft_megatron.data.batches import BatchesInOrder, BatchShare, SampleBatches, ShuffledBatches
from hft_megatron.data.dataset import SftDataset
from hft_megatron.data.order import SampleStream
from hft_megatron.data.pairs import PairDataset

DatasetT = TypeVar("DatasetT", SftDataset, PairDataset)


@dataclass(frozen=True, kw_only=True)
class RecordData(ABC, Generic[DatasetT]):
    """The ``RunData`` of --train-data-path and --valid-data-path."""

    train: DatasetT
    valid: DatasetT | None
    samples: SampleStream
    """The training examples or pairs, or packs of them, in their order."""
    packed: bool
    eval_iters: int | None
    pad_id: int
    order_digest: None = None

    @abstractmethod
    def batches(self, dataset: DatasetT, share: BatchShare, *, first: int) -> SampleBatches:
        """Micro-batches of ``dataset``, whose first member has the number ``first`` among all of the run: those of
        training come first, and those of validation behind them."""

    @property
    def digest(self) -> str:
        return self.train.digest

    @property
    def uses_chat_template(self) -> bool:
        return self.train.uses_chat_template

    def describe(self) -> list[str]:
        return [line for dataset in (self.train, self.valid) if dataset is not None for line in dataset.describe()]

    def training(self, share: BatchShare) -> ShuffledBatches:
        batches = self.batches(self.train, share, first=0)
        return ShuffledBatches(batches=batches, order=self.samples, packed=self.packed)

    def validation(self, share: BatchShare) -> BatchesInOrder | None:
        if self.valid is None:
            return None
        return BatchesInOrder(batches=self.batches(self.valid, share, first=len(self.train)), limit=self.eval_iters)
