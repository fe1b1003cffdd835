"""Rules about how pipeline stages share the model's layers, and the split to propose where they can't.

Rules take (options, shape, world size) and raise UserError with one sentence; ``validation`` runs them.
"""

from dataclasses import replace
from itertools import groupby

from hft_megatron.config.derived import layers_per_stage
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.schema import ParallelConfig, RunConfig
from hft_megatron.errors import UserError

FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"


def pipeline_stages_share_the_layers(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Every stage holds a layer at least, and stages that no option sizes hold equally many (megatron-core's rule)."""
    parallel, layers = config.parallel, shape.num_layers
    stages, given = parallel.pipeline_model_parallel_size, end_words(parallel)
    if stages == 1 and given:
        raise UserError(f"{given} needs --pipeline-model-parallel-size of at least 2; leave it out.")
    if stages > layers:
        raise UserError(
            f"--pipeline-model-parallel-size {stages} is more than the model's {layers} layers, and every stage needs "
            f"one; the largest size that fits is {layers}."
        )
    if holds_all_layers(parallel, layers):
        return
    ends = _given_ends(parallel)
    rest, others = layers - sum(ends.values()), stages - len(ends)
    others_words = "the other stage" if others == 1 else f"the other {others} stages"
    if not ends:
        fault = f"--pipeline-model-parallel-size {stages} does not divide the model's {layers} layers"
    elif not others:
        fault = f"{given} are {layers - rest} layers for both stages, and the model has {layers}"
    elif rest < others:
        fault = f"{given} leaves {max(rest, 0)} of the model's {layers} layers for {others_words}"
    else:
        fault = f"{given} leaves {rest} of the model's {layers} layers, no equal shares for {others_words}"
    fitting = _nearest_split(parallel, layers) if ends else proposed_split(parallel, layers)
    raise UserError(f"{fault}; {end_words(fitting)} fits ({_split_words(fitting, layers)}).")


def virtual_stages_share_the_layers(config: RunConfig, shape: ModelShape, world_size: int) -> None:
    """Every stage holds several chunks of equal size under the interleaved schedule."""
    parallel = config.parallel
    stages, chunk = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    if chunk is None:
        return
    option, per_stage = f"--num-layers-per-virtual-pipeline-stage {chunk}", shape.num_layers // stages
    if stages == 1:
        raise UserError(f"{option} needs --pipeline-model-parallel-size of at least 2; leave it out.")
    if uneven := end_words(parallel):
        raise UserError(f"{option} interleaves stages of equal size, and {uneven} makes them uneven; leave one out.")
    if per_stage % chunk:
        raise UserError(
            f"{option} does not divide the {per_stage} layers of a pipeline stage ({shape.num_layers} layers over "
            f"{stages} stages); the nearest number that fits is {nearest_divisor(chunk, per_stage)}."
        )
    if chunk == per_stage:
        raise UserError(f"{option} is all of a stage's layers, so nothing interleaves; give fewer or leave it out.")


def holds_all_layers(parallel: ParallelConfig, num_layers: int) -> bool:
    """Whether the stages hold a layer or more each, and together all of them."""
    held = layers_per_stage(parallel, num_layers)
    return len(held) == parallel.pipeline_model_parallel_size and min(held) > 0 and sum(held) == num_layers


def proposed_split(parallel: ParallelConfig, num_layers: int) -> ParallelConfig:
    """The most even split of the layers over the stages, which are no more than layers.

    The largest stage is as small as can be, then the options are few, then the smallest stage is large; of two ends the
    last one, which also has the head, holds less.
    """
    stages = parallel.pipeline_model_parallel_size
    ends: list[tuple[int | None, int | None]] = [(None, None)]
    for share in range(1, num_layers if stages > 1 else 1):
        one = num_layers - share * (stages - 1)
        two = num_layers - share * (stages - 2)
        ends += [(None, one), (one, None), (two - two // 2, two // 2)]
    splits = [_with_ends(parallel, first, last) for first, last in ends]

    def unevenness(split: ParallelConfig) -> tuple[int, int, int, int]:
        held = layers_per_stage(split, num_layers)
        return max(held), len(_given_ends(split)), -min(held), held[-1]

    return min((split for split in splits if holds_all_layers(split, num_layers)), key=unevenness)


def end_words(parallel: ParallelConfig) -> str:
    """The options that size the first and the last stage, as one gives them; empty without them."""
    return " ".join(f"--{name.replace('_', '-')} {size}" for name, size in _given_ends(parallel).items())


def pipeline_words(parallel: ParallelConfig, num_layers: int) -> str:
    """``PP 2``, and where stages are uneven what they hold: ``PP 2 (3 + 1 layers)``."""
    held = f" ({_split_words(parallel, num_layers)})" if _given_ends(parallel) else ""
    return f"PP {parallel.pipeline_model_parallel_size}{held}"


def nearest_divisor(wanted: int, total: int) -> int:
    """The divisor of ``total`` closest to ``wanted``, the smaller one of two equally close."""
    return min((d for d in range(1, total + 1) if total % d == 0), key=lambda d: (abs(d - wanted), d))


def _nearest_split(parallel: ParallelConfig, num_layers: int) -> ParallelConfig:
    """The split by the same options whose values are closest to the given ones."""
    given = _given_ends(parallel)
    sizes = range(1, num_layers)
    splits = [
        _with_ends(parallel, first, last)
        for first in (sizes if FIRST in given else (None,))
        for last in (sizes if LAST in given else (None,))
    ]

    def distance(split: ParallelConfig) -> int:
        return sum(abs(getattr(split, name) - size) for name, size in given.items())

    return min((split for split in splits if holds_all_layers(split, num_layers)), key=distance)


def _given_ends(parallel: ParallelConfig) -> dict[str, int]:
    """The options that size an end of the pipeline, where they are given."""
    return {name: size for name in (FIRST, LAST) if (size := getattr(parallel, name)) is not None}


def _with_ends(parallel: ParallelConfig, first: int | None, last: int | None) -> ParallelConfig:
    return replace(parallel, decoder_first_pipeline_num_layers=first, decoder_last_pipeline_num_layers=last)


def _split_words(parallel: ParallelConfig, num_layers: int) -> str:
    """``2 + 6 x 4 + 2 layers``: what the stages hold, first to last."""
    counts = [(size, len(list(equal))) for size, equal in groupby(layers_per_stage(parallel, num_layers))]
    return " + ".join(f"{size}" if count == 1 else f"{count} x {size}" for size, count in counts) + " layers"
