"""Options of the objective of fine-tuning, and the rules that hold for every objective."""

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
    """Objective over the trained tokens of examples."""

    objective: Annotated[ObjectiveName, SAME_RUN] = "nll"
    """Objective to minimise: the tokens' mean negative log-likelihood (nll); the same weighted by each token's
    probability (dft), by the entropy of the model's 20 likeliest tokens (eaft), or by the probability under a
    temperature (talr); dft plus a KL divergence from the first weights (asft); or Intuitive Fine-Tuning (ift).
    docs/objectives.md has the formulas."""
    kl_to_base: Annotated[float, Ge(0), SAME_RUN] | None = None
    """Weight of the KL divergence of the model from the weights that the run starts from, per trained token; 0.1 for
    asft and 0 otherwise when unset."""
    kl_reference: ReferenceKind = "shared"
    """Source of the first weights for that divergence: a copy of the trainable units, put in their place for a second
    forward pass in every step (shared), or a second model (model). Both give the same losses."""
    ift_lambda: Annotated[float, Ge(0), Le(1), SAME_RUN] = 0.2
    """Share of the model's own predictions in the embeddings that ift feeds it."""
    ift_gamma: Annotated[float, Ge(0), Le(1), SAME_RUN] = 0.95
    """Factor with which the loss of a token counts in the weight of the token before it, for ift."""
    ift_weights: Annotated[IftWeights, SAME_RUN] = "authors"
    """Gradients through the weights of ift: with them, as in the authors' code (authors), or without (detached)."""


def kl_reference_knows_distributions(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """A divergence needs the probability of every token of the vocabulary, which no cache holds."""
    if config.objectives.kl_reference == "precompute":
        raise UserError(
            "--kl-reference precompute keeps one number per answer, but the divergence of --kl-to-base needs the "
            "probabilities of the whole vocabulary at every token; choose shared or model."
        )


def examples_are_learned_as_they_are(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Refuse other objectives for a method that has an objective of its own."""
    objectives = config.objectives
    given = None
    if objectives.objective != "nll":
        given = f"--objective {objectives.objective}"
    elif objectives.kl_to_base:
        given = f"--kl-to-base {objectives.kl_to_base:g}"
    if given is not None:
        raise UserError(f"{given} is for the examples of sft; leave it out of other stages.")
