"""Low-rank adapters beside a model's matrices, and the names of their parts. Imports no torch."""

from dataclasses import dataclass

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Last parts of the Hugging Face names of all matrices in a layer, in its order."""
ADAPTER_PARTS = ("lora_A", "lora_B")
"""The two matrices of an adapter, whose units are named after their matrix's: ``...q_proj.lora_A``."""


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Low-rank adapters: W x becomes W x + alpha / rank x B A x (Hu et al., LoRA, arXiv 2106.09685)."""

    rank: int
    """Rows of every A and columns of every B."""
    alpha: float
    dropout: float = 0.0
    """Probability that an entry of an A's input is left out in training; the others are divided by its complement."""
    targets: tuple[str, ...]
    """Last parts of the Hugging Face names of the matrices that have one, in the order of a layer."""

    @property
    def scale(self) -> float:
        """Factor of B A x."""
        return self.alpha / self.rank

    def __str__(self) -> str:
        return f"rank {self.rank}, alpha {self.alpha:g}, dropout {self.dropout:g} on {', '.join(self.targets)}"


def adapted_unit(unit: str) -> str | None:
    """The unit of the matrix that an adapter's unit belongs to; None for a unit that is no adapter's."""
    matrix, _, part = unit.rpartition(".")
    return matrix if part in ADAPTER_PARTS else None


def has_adapter(unit: str, adapters: Adapters | None) -> bool:
    """Return whether the matrix of this name has an adapter beside it."""
    return adapters is not None and unit.rpartition(".")[2] in adapters.targets
