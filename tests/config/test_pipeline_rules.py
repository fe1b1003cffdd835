"""How pipeline stages share the layers, against megatron-core. Run: pytest tests/config/test_pipeline_rules.py"""

from itertools import product

import pytest

from hft_megatron.config.derived import layers_of_chunks, layers_per_stage
from hft_megatron.config.parallel import (
    ParallelConfig,
    end_words,
    pipeline_stages_share_the_layers,
    pipeline_words,
    proposed_split,
)
from hft_megatron.config.run import RunConfig
from hft_megatron.errors import UserError
from hft_megatron.model.parameter_names import chunk_places
from tests.support.shapes import tiny_shape

MOST_LAYERS, MOST_STAGES = 7, 4


def uneven(stages: int, first: int | None = None, last: int | None = None) -> ParallelConfig:
    return ParallelConfig(
        pipeline_model_parallel_size=stages,
        decoder_first_pipeline_num_layers=first,
        decoder_last_pipeline_num_layers=last,
    )


def refusal(parallel: ParallelConfig, num_layers: int) -> str | None:
    """The sentence, where the rule has one."""
    try:
        pipeline_stages_share_the_layers(RunConfig(parallel=parallel), tiny_shape(num_layers), 1)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.engine
def test_every_split_is_megatron_cores_and_what_it_refuses_is_refused_before_a_model_is_built() -> None:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    accepted = 0
    ends = (None, *range(1, MOST_LAYERS + 2))
    for layers, stages, first, last in product(range(1, MOST_LAYERS + 1), range(2, MOST_STAGES + 1), ends, ends):
        parallel = uneven(stages, first, last)

        def engines_ranges(layers: int = layers, parallel: ParallelConfig = parallel) -> list[range]:
            config = TransformerConfig(
                num_layers=layers,
                hidden_size=8,
                num_attention_heads=2,
                pipeline_dtype="unused",
                pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
                num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
                num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
            )
            held = []
            for rank in range(parallel.pipeline_model_parallel_size):
                size = get_num_layers_to_build(config, None, rank)
                assert size > 0
                held.append(range(start := get_transformer_layer_offset(config, None, rank), start + size))
            return held

        if refusal(parallel, layers) is None:
            accepted += 1
            assert list(layers_of_chunks(parallel, layers)) == engines_ranges()
        else:
            with pytest.raises((AssertionError, ValueError)):
                engines_ranges()
    assert accepted > 50


def test_a_stage_holds_the_layers_of_its_chunks_and_together_they_are_all() -> None:
    shape = tiny_shape(7)
    parallel = uneven(3, first=2, last=1)
    places = [chunk_places(shape, parallel, rank) for rank in range(3)]
    assert [[(place.first_layer, place.layers) for place in rank] for rank in places] == [[(0, 2)], [(2, 4)], [(6, 1)]]
    assert [[(place.is_first, place.is_last) for place in rank] for rank in places] == [
        [(True, False)],
        [(False, False)],
        [(False, True)],
    ]


def test_what_is_proposed_fits_and_is_even_where_it_can_be() -> None:
    for layers in range(1, 25):
        for stages in range(1, layers + 1):
            split = proposed_split(ParallelConfig(pipeline_model_parallel_size=stages), layers)
            assert refusal(split, layers) is None
            assert (end_words(split) == "") == (layers % stages == 0)
    assert layers_per_stage(proposed_split(uneven(4), 30), 30) == (8, 8, 8, 6)  # SmolLM2
    assert layers_per_stage(proposed_split(uneven(4), 22), 22) == (6, 6, 6, 4)  # TinyLlama
    assert layers_per_stage(proposed_split(uneven(8), 28), 28) == (2, 4, 4, 4, 4, 4, 4, 2)  # Llama 3.2 of 3B


REFUSALS = [
    (uneven(2), 3, "--pipeline-model-parallel-size 2 does not divide the model's 3 layers; --decoder-first-"),
    (uneven(4), 3, "4 is more than the model's 3 layers, but every stage needs one; the largest size that fits is 3"),
    (uneven(1, first=3), 3, "--decoder-first-pipeline-num-layers 3 needs --pipeline-model-parallel-size of at least 2"),
    (
        uneven(2, last=3),
        3,
        "-last-pipeline-num-layers 3 leaves 0 of the model's 3 layers for the other stage; --decoder",
    ),
    (
        uneven(2, 1, 1),
        3,
        "1 give the two stages 2 layers, but the model has 3; --decoder-first-pipeline-num-layers 1 --",
    ),
    (
        uneven(4, 4),
        30,
        "4 leaves 26 of the model's 30 layers, which the other 3 stages cannot share equally; --decoder-first-",
    ),
    (uneven(4, 4), 30, "--decoder-first-pipeline-num-layers 3 fits (3 + 3 x 9 layers)"),
]


@pytest.mark.parametrize(("parallel", "layers", "said"), REFUSALS)
def test_a_split_that_does_not_fit_is_refused_with_the_nearest_that_does(
    parallel: ParallelConfig, layers: int, said: str
) -> None:
    assert said in (refusal(parallel, layers) or "")


def test_uneven_stages_are_told_beside_their_number() -> None:
    assert pipeline_words(uneven(2), 8) == "PP 2"
    assert pipeline_words(uneven(2, first=5), 8) == "PP 2 (5 + 3 layers)"
    assert pipeline_words(uneven(4, last=1), 7) == "PP 4 (3 x 2 + 1 layers)"
