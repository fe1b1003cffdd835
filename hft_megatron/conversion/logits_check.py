"""A check that our model and transformers compute the same: logits of both for one fixed batch, in fp32."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.model.build import build_model
from hft_megatron.model.parameters import parameter_slots
from hft_megatron.parallel.groups import start_backend, start_groups, stop_groups

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of logits, as a share of the largest logit, by the coarsest data type that the weights of only one
side were rounded to; fp32 where both sides have the same values, and only the order of sums differs."""

_SEQUENCES, _LENGTH = 2, 64


@dataclass(frozen=True, kw_only=True)
class LogitDifference:
    """Difference of two models' logits on one batch."""

    largest: float
    """Largest absolute difference of two logits."""
    scale: float
    """Largest absolute logit of transformers' model."""
    tolerance: float
    """Largest share of ``scale`` that is accepted."""

    @property
    def is_within(self) -> bool:
        """True if within the tolerance; False also where a logit is not a number."""
        return self.largest <= self.tolerance * self.scale

    def describe(self) -> str:
        share = self.largest / self.scale if self.scale else float("nan")
        return (
            f"logits of {_SEQUENCES} sequences differ from transformers' by at most {self.largest:.3g}, "
            f"{share:.2g} of the largest logit (tolerance {self.tolerance:g})"
        )


def compare_logits(
    folder: str, shape: ModelShape, read: Callable[[str], Tensor], *, rounded_to: torch.dtype
) -> LogitDifference:
    """Compares transformers' model of ``folder`` with ours, whose weights are ``read(unit)``.

    ``rounded_to`` is the key of ``TOLERANCES``. One model after the other is held in fp32, 4 bytes per parameter.
    Needs the environment of a run of one rank, and ends its process groups.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(_LENGTH, shape.max_position_embeddings)
    tokens = torch.randint(0, shape.vocab_size, (_SEQUENCES, length), generator=generator)
    reference = _logits_by_transformers(folder, tokens)
    difference = (_our_logits(shape, read, tokens) - reference).abs().max().item()
    return LogitDifference(largest=difference, scale=reference.abs().max().item(), tolerance=TOLERANCES[rounded_to])


def _logits_by_transformers(folder: str, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    with torch.inference_mode():
        logits: Tensor = model(tokens).logits
    return logits.float()


def _our_logits(shape: ModelShape, read: Callable[[str], Tensor], tokens: Tensor) -> Tensor:
    start_backend(ParallelConfig())
    placement = start_groups(ParallelConfig(), shape.num_layers, seed=0)
    [model] = build_model(shape, ParallelConfig(), TrainingConfig(), placement=placement, dtype=torch.float32)
    tokens = tokens.to(placement.device)
    with torch.no_grad():
        for slot in parameter_slots([model]):
            slot.parameter.copy_(read(slot.unit))
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        logits: Tensor = model(tokens, positions, None)
    stop_groups()
    return logits.float().cpu()
