"""Options of what a fine-tuning minimises, and the rules that hold whatever that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from hft_megatron.config.declared import SAME_RUN
from hft_megatron.config.dpo import ReferenceKind
from hft_megatron.config.names import ObjectiveName
from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.run import RunConfig

IftWeights = Literal["authors", "detached"]


@dataclass(frozen=True, kw_only=True)
class ObjectivesConfig:
    """What is minimised over the trained tokens of examples."""

    objective: Annotated[ObjectiveName, SAME_RUN] = "nll"
    """The tokens' mean negative log-likelihood (nll); weighted by each token's probability (dft), by the entropy of the
    model's 20 likeliest tokens (eaft), or by the probability under a temperature (talr); dft and a KL divergence from
    the first weights (asft); or Intuitive Fine-Tuning (ift). docs/objectives.md has the formulas."""
    kl_to_base: Annotated[float, Ge(0), SAME_RUN] | None = None
    """Add this times the KL divergence of the model from the weights that the run starts from, per trained token; 0.1
    for asft and 0 otherwise when unset."""
    kl_reference: ReferenceKind = "shared"
    """Where that divergence has the first weights from: a copy of just the units that train, put in their place for a
    second forward pass in every step (shared), or a second model (model). Both give the same losses."""
    ift_lambda: Annotated[float, Ge(0), Le(1), SAME_RUN] = 0.2
    """Share of the model's own predictions in the embeddings that ift feeds it."""
    ift_gamma: Annotated[float, Ge(0), Le(1), SAME_RUN] = 0.95
    """How much the loss of a token counts in the weight of the token before it."""
    ift_weights: Annotated[IftWeights, SAME_RUN] = "authors"
    """Whether gradients go through the weights of ift as well, as in the authors' code, or not (detached)."""


def kl_reference_knows_distributions(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A divergence needs the probability of every token of the vocabulary, which no cache holds."""
    if config.objectives.kl_reference == "precompute":
        raise UserError(
            "--kl-reference precompute keeps a number for each answer, and the divergence of --kl-to-base needs the "
            "probabilities of the whole vocabulary at every token; choose shared or model."
        )


def examples_are_learned_as_they_are(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Of a method that has an objective of its own."""
    objectives = config.objectives
    given = None
    if objectives.objective != "nll":
        given = f"--objective {objectives.objective}"
    elif objectives.kl_to_base:
        given = f"--kl-to-base {objectives.kl_to_base:g}"
    if given is not None:
        raise UserError(f"{given} is for the examples of sft; leave it out of other stages.")
