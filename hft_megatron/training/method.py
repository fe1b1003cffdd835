"""What a method (sft, pretrain and so on) gives a run. Everything else of a run is the same for all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.schema import MethodName, RunConfig
from hft_megatron.data.batches import BatchShare, TrainingSteps, ValidationSteps
from hft_megatron.data.order import SampleStream
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.objectives.objective import Objective

if TYPE_CHECKING:
    from hft_megatron.training.run import Reference


class RunData(Protocol):
    """What a run trains and validates on, the same on every rank."""

    @property
    def digest(self) -> str:
        """sha256 of the training data."""

    @property
    def order_digest(self) -> str | None:
        """Of the order of the training samples, where seed and data alone don't decide it."""

    @property
    def samples(self) -> SampleStream | None:
        """The training samples in their order, where epochs can be told apart in it."""

    @property
    def uses_chat_template(self) -> bool:
        """Whether the chat template has rendered any of the training data."""

    def describe(self) -> list[str]:
        """Lines for the log."""

    def training(self, share: BatchShare) -> TrainingSteps:
        """This rank's part of every training step."""

    def validation(self, share: BatchShare) -> ValidationSteps | None:
        """This rank's part of every validation; None where there is nothing to validate on."""


ReadData = Callable[[RunConfig, Tokenizer, ModelShape, int], RunData]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train."""

    name: MethodName
    objective: Callable[[RunConfig], Objective]
    """What the options of the method make of it."""
    read_data: ReadData
    """Takes the resolved options, tokenizer, shape and world size; UserError for a mistake in the data."""
    reference: "Callable[..., Reference] | None" = None
    """What the trained model is compared with, where there is such a thing: takes the run's inputs, model chunks,
    rounds, share of a batch, placement and announcer, before a checkpoint fills the chunks; collective."""
