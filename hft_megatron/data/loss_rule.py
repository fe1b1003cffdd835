"""Which part of an example is trained."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LossRule:
    """--loss-on and --train-on-eos."""

    loss_on: Literal["assistant", "all", "last"] = "assistant"
    """The assistant's turns or the completion; everything, tags of the template included; the assistant's last turn."""
    train_on_eos: bool = True
    """Whether the token that ends an assistant's turn or a completion is trained with it."""
