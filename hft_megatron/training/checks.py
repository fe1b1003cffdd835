"""``--check``: everything that can go wrong before a model is built, without building one."""

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.schema import RunConfig
from hft_megatron.training.inputs import read_inputs
from hft_megatron.training.method import Method
from hft_megatron.training.start import with_schedule


def check_inputs(method: Method, config: RunConfig, shape: ModelShape | None, world_size: int) -> None:
    """Reads tokenizer, data and the saved run, and prints what was found; UserError for the first mistake."""
    inputs = read_inputs(method, config, shape, world_size)
    for line in inputs.describe():
        print(line)
    with_schedule(inputs, world_size, print)
