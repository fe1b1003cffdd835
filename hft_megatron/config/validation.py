"""Checks a run's options in milliseconds, before torch is imported or a rank waits for another.

Every rank runs the same rules on the same options and so comes to the same answer: no rank is left waiting.
"""

from collections.abc import Callable

from hft_megatron.config import checkpoint, data, exports, hft, lora, model, optimizer, parallel, tracking, training
from hft_megatron.config.declared import check_bounds
from hft_megatron.config.model_shape import HF_CONFIG_FILE, ModelShape, load_hf_config
from hft_megatron.config.names import MethodName
from hft_megatron.config.run import RunConfig

Rule = Callable[[RunConfig, ModelShape, int], None]


def numbers_are_in_bounds(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Every number is one that its option's declaration allows."""
    check_bounds(config)


_RULES: tuple[Rule, ...] = (
    numbers_are_in_bounds,
    model.heads_fit_the_model,
    parallel.tensor_parallel_divides_the_model,
    parallel.pipeline_stages_share_the_layers,
    parallel.virtual_stages_share_the_layers,
    parallel.ranks_factor_into_the_layout,
    training.batch_divides_over_the_ranks,
    parallel.overlaps_fit_together,
    training.recompute_options_fit_together,
    training.sequence_fits_the_model,
    training.gradients_have_a_precision,
    training.length_is_given_once,
    optimizer.decay_style_has_what_it_needs,
    training.iterations_are_numbered_from_1,
    optimizer.a_part_of_a_schedule_is_within_it,
    optimizer.schedule_fits_the_run,
    optimizer.decoupled_rates_fit,
    optimizer.weight_decay_is_given_once,
    tracking.tasks_are_there,
    tracking.profile_fits_the_run,
    *lora.LORA_RULES,
    lora.adapters_fit_the_run,
    *hft.METHOD_RULES,
    data.tokenizer_is_given,
    checkpoint.outputs_have_a_place,
    checkpoint.load_is_the_folder_of_a_run,
    checkpoint.one_schedule_is_chosen,
    exports.exports_fit_the_run,
    checkpoint.kept_checkpoints_exist,
    checkpoint.a_new_run_has_its_own_folder,
    hft.scores_are_of_the_first_weights,
    exports.nothing_is_overwritten,
    checkpoint.outputs_can_be_written,
)
"""Rules of every run, in an order in which the numbers that a rule divides by have been checked by an earlier one."""

DATA_RULES: dict[MethodName, tuple[Rule, ...]] = {}
"""Rules of every method about its own data, which run after those. Filled by ``methods.registry``."""

_NEEDS_NO_DATA = {
    numbers_are_in_bounds,
    model.heads_fit_the_model,
    parallel.tensor_parallel_divides_the_model,
    parallel.pipeline_stages_share_the_layers,
    parallel.virtual_stages_share_the_layers,
    parallel.ranks_factor_into_the_layout,
    parallel.overlaps_fit_together,
    training.recompute_options_fit_together,
    training.sequence_fits_the_model,
    training.gradients_have_a_precision,
    *lora.LORA_RULES,
    *hft.METHOD_RULES,
}
PLAN_RULES: tuple[Rule, ...] = tuple(rule for rule in _RULES if rule in _NEEDS_NO_DATA)
"""Rules that need no data, tokenizer, batch or output folder."""

LAYOUT_RULES: tuple[Rule, ...] = (
    numbers_are_in_bounds,
    parallel.ranks_factor_into_the_layout,
    parallel.overlaps_fit_together,
)
"""Rules that look at neither a model nor a file."""

ANY_SHAPE = ModelShape(
    num_layers=1,
    hidden_size=1,
    ffn_hidden_size=1,
    num_attention_heads=1,
    num_query_groups=1,
    kv_channels=1,
    vocab_size=1,
    max_position_embeddings=1,
)
"""Shape for rules that look at no model, where there is none."""


def validate(config: RunConfig, shape: ModelShape | None, world_size: int, method: MethodName) -> None:
    """Raise UserError for the first rule that the options break; ``world_size`` counts ranks over all nodes.

    ``shape`` is None where only the tokenizer can say how large the vocabulary is, which no rule reads.
    """
    shape = shape or ModelShape.from_model_config(config.model, vocab_size=1)
    for rule in (*_RULES, *DATA_RULES[method]):
        rule(config, shape, world_size)


def validate_plan(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Raise UserError for the first rule that a plan and its layout break."""
    for rule in PLAN_RULES:
        rule(config, shape, world_size)


def validate_layout(config: RunConfig, world_size: int) -> None:
    """Raise UserError for the first rule that a layout breaks whatever the model is."""
    for rule in LAYOUT_RULES:
        rule(config, ANY_SHAPE, world_size)


def shape_of(config: model.ModelConfig, vocab_size: int | None = None) -> ModelShape | None:
    """The model's shape, or None when only the tokenizer can say how large the vocabulary is.

    ``vocab_size`` is the tokenizer's, used when there is neither --load-hf nor --vocab-size. Raises UserError when
    no model is given, two are, or the one given cannot be represented.
    """
    model.model_is_given_once(config)
    if config.load_hf is not None:
        return ModelShape.from_hf_config(load_hf_config(config.load_hf), source=f"{config.load_hf}/{HF_CONFIG_FILE}")
    rows = vocab_size if config.vocab_size is None else config.vocab_size
    return None if rows is None else ModelShape.from_model_config(config, vocab_size=rows)
