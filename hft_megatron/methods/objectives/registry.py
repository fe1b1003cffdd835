"""The objectives of fine-tuning: each has a value of --objective, rules, and a training objective.

Declared without torch, so that the command line can check options before it loads anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from hft_megatron.config import derived, objectives
from hft_megatron.config.declared import flag
from hft_megatron.config.lora import adapters_of
from hft_megatron.config.names import ObjectiveName, add
from hft_megatron.config.objectives import ObjectivesConfig
from hft_megatron.config.validation import Rule
from hft_megatron.errors import UserError

if TYPE_CHECKING:
    from hft_megatron.config.model_shape import ModelShape
    from hft_megatron.config.run import RunConfig
    from hft_megatron.methods.objectives.asked import Question
    from hft_megatron.trainer.method import Objective


@dataclass(frozen=True, kw_only=True, eq=False)
class ObjectiveDeclaration:
    """Declaration of an objective, before torch is imported."""

    name: ObjectiveName
    """The value of --objective."""
    load: Callable[[RunConfig], Objective]
    """Imports its code, and sets it up by the options."""
    question: Callable[[], Question] | None = None
    """Imports the pass of the trained model over every batch before its step; None: none."""
    kl_to_base: float = 0.0
    """Weight of the divergence from the first weights where --kl-to-base is unset."""
    options: tuple[str, ...] = ()
    """Fields of ObjectivesConfig that have a meaning with it alone."""
    rules: tuple[Rule, ...] = ()
    """Rules for its own options."""
    notes: Callable[[RunConfig], list[str]] = lambda config: []
    """Lines for the log about its options."""


OBJECTIVES: dict[ObjectiveName, ObjectiveDeclaration] = {}
"""Declared objectives by name."""


def register(declaration: ObjectiveDeclaration) -> None:
    """Adds a value of --objective."""
    add(ObjectiveName, declaration.name)
    OBJECTIVES[declaration.name] = declaration


def chosen(config: RunConfig) -> ObjectiveDeclaration:
    """The objective that the options name."""
    return OBJECTIVES[config.objectives.objective]


def kl_weight(config: RunConfig) -> float:
    """Weight of the divergence from the first weights; 0: none."""
    given = config.objectives.kl_to_base
    return chosen(config).kl_to_base if given is None else given


def in_words(config: RunConfig) -> str | None:
    """The objective and its options, for the log; None for the plain loss alone."""
    name, weight = config.objectives.objective, kl_weight(config)
    options = [f"{flag(option)} {getattr(config.objectives, option)}" for option in chosen(config).options]
    words = f"{name} ({', '.join(options)})" if options else name
    words += f", and {weight:g} x the KL divergence from the first weights" if weight else ""
    return None if words == "nll" else words


def objective_of(config: RunConfig) -> Objective:
    """The objective that the options of a fine-tuning describe."""
    return chosen(config).load(config)


_DEFAULTS = {field.name: field.default for field in fields(ObjectivesConfig)}


def options_have_a_meaning(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Raises UserError for an option of another objective, which would be silently ignored."""
    options = config.objectives
    for other in OBJECTIVES.values():
        for name in other.options if other.name != options.objective else ():
            if getattr(options, name) != _DEFAULTS[name]:
                raise UserError(
                    f"{flag(name)} {getattr(options, name)} is an option of --objective {other.name}, but --objective "
                    f"is {options.objective}; leave it out, or use --objective {other.name}."
                )
    if options.kl_reference != _DEFAULTS["kl_reference"] and kl_weight(config) == 0:
        raise UserError(
            f"--kl-reference {options.kl_reference} names the first weights for --kl-to-base, which is 0; leave "
            f"it out, or add --kl-to-base 0.1."
        )


def objective_fits_the_run(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Applies the rules of all objectives, and those of the chosen one."""
    rules = (objectives.kl_reference_knows_distributions, options_have_a_meaning, *chosen(config).rules)
    for rule in rules:
        rule(config, shape, world_size)


def _nll(config: RunConfig) -> Objective:
    from hft_megatron.methods.next_token import NEXT_TOKEN
    from hft_megatron.methods.objectives.weighted import alike, weighted_objective

    return NEXT_TOKEN if kl_weight(config) == 0 else weighted_objective(alike, kl=kl_weight(config))


def _dft(config: RunConfig) -> Objective:
    from hft_megatron.methods.objectives.weighted import by_probability, weighted_objective

    return weighted_objective(by_probability, kl=kl_weight(config))


def _eaft(config: RunConfig) -> Objective:
    from hft_megatron.methods.objectives.weighted import LIKELIEST, by_entropy, weighted_objective

    return weighted_objective(by_entropy, entropy_of=LIKELIEST, kl=kl_weight(config))


def _talr(config: RunConfig) -> Objective:
    from hft_megatron.methods.objectives.weighted import by_tempered_probability, weighted_objective

    return weighted_objective(by_tempered_probability, kl=kl_weight(config))


def _temperature() -> Question:
    from hft_megatron.methods.objectives.weighted import ask_temperature

    return ask_temperature


def _ift(config: RunConfig) -> Objective:
    from hft_megatron.methods.objectives.ift import intuitive_objective

    return intuitive_objective(config.objectives)


def _predictions() -> Question:
    from hft_megatron.methods.objectives.ift import ask_predictions

    return ask_predictions


def divergence_is_of_examples_as_they_are(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Refuses the divergence on inputs that are partly the model's own predictions, unknown to the first weights."""
    if kl_weight(config) > 0:
        raise UserError(
            f"--kl-to-base {kl_weight(config):g} compares distributions on the examples as they are, and --objective "
            f"ift trains on inputs mixed with predictions; leave it out."
        )


def embedding_is_frozen(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Refuses a trainable embedding, which weight decay alone would change. A plan file decides itself what trains, and
    beside adapters no matrix does."""
    hft, names = config.hft, ("model.embed_tokens", "model.embed_tokens.weight")
    frozen = hft.hft_freeze_embedding or any(
        fnmatchcase(name, pattern) for name in names for pattern in derived.patterns(hft.hft_freeze)
    )
    if not shape.tie_embeddings and not frozen and hft.hft_plan is None and adapters_of(config.lora) is None:
        raise UserError(
            "--objective ift gives the input embedding no gradient, so only weight decay would change it; add "
            "--hft-freeze-embedding."
        )


def note_negative_weights(config: RunConfig) -> list[str]:
    """A warning about what the authors' weights can do to the end of an answer."""
    if config.objectives.ift_weights == "detached" or config.objectives.ift_gamma == 0:  # at 0 all weights are 1
        return []
    return [
        "warning: --ift-weights authors sends gradients through the weights, as the authors' code does: the last "
        "trained tokens of an example, its end token among them, can get a negative weight, which makes them less "
        "likely; with --ift-weights detached none can"
    ]


register(ObjectiveDeclaration(name="nll", load=_nll))
register(ObjectiveDeclaration(name="dft", load=_dft))
register(ObjectiveDeclaration(name="eaft", load=_eaft))
register(ObjectiveDeclaration(name="talr", load=_talr, question=_temperature))
register(ObjectiveDeclaration(name="asft", load=_dft, kl_to_base=0.1))
register(
    ObjectiveDeclaration(
        name="ift",
        load=_ift,
        question=_predictions,
        options=("ift_lambda", "ift_gamma", "ift_weights"),
        rules=(divergence_is_of_examples_as_they_are, embedding_is_frozen),
        notes=note_negative_weights,
    )
)
