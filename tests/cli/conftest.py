"""A tiny model folder and stand-ins for training, so that the command line is tested without torch."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.run import RunConfig

SHAPE = ModelShape(
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=300,
    max_position_embeddings=128,
)
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def nobody_launched_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCH_VARIABLES:
        # Set first, so that what a command puts into the environment is taken out again.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A Hugging Face folder with nothing but a config.json: 8 layers, 8 heads in 4 groups, 128 positions."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE.to_hf_config()))
    return folder


class Training:
    """Stands in for the modules that a command imports once its options are right."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, RunConfig, ModelShape | None]] = []
        self.outcome: Callable[[], None] = lambda: None

    def run_training(
        self, method: str, config: RunConfig, shape: ModelShape | None, world_size: int, *, on_loss: object
    ) -> None:
        self.calls.append(("run", config, shape))
        self.outcome()

    def check_inputs(
        self, method: str, config: RunConfig, shape: ModelShape | None, world_size: int, announce: object
    ) -> None:
        self.calls.append(("check", config, shape))
        self.outcome()


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    """Records what would be trained or checked; set ``outcome`` to make it fail."""
    stand_in = Training()
    for name, function in (("assembly", stand_in.run_training), ("stages", stand_in.check_inputs)):
        module: Any = types.ModuleType(f"hft_megatron.trainer.{name}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return stand_in
