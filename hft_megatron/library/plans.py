"""The library: plans for any trainer. ``Trainer`` is this project's own, and is loaded with torch on first use.

Drawing a plan loads neither torch nor megatron.
"""

import json
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from hft_megatron.config.hft import CHOICE_RULES, Counting, HFTConfig, Level, Pairing, Rotation
from hft_megatron.config.model_shape import HF_CONFIG_FILE, ModelShape
from hft_megatron.config.names import SELECTIONS, SelectionName
from hft_megatron.config.run import RunConfig
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan, make_plan
from hft_megatron.hft.policy import check_choice

_FLAG = re.compile(r"(?<![\w/.-])--([a-z][a-z0-9-]*)")
"""An option in a sentence, but not within a path: Hugging Face's cache has folders like models--ORGANISATION--NAME."""


class HasConfig(Protocol):
    """A transformers config."""

    def to_dict(self) -> dict[str, Any]:
        """The contents of its ``config.json``."""
        ...


def draw_plan(
    model: HasConfig | Mapping[str, Any] | str | PathLike[str] | ModelShape,
    *,
    ratio: float = 0.5,
    level: Level = "category",
    selection: SelectionName = "random",
    counting: Counting = "matrices",
    pairing: Pairing = "independent",
    rotation: Rotation = "independent",
    seed: int = 1234,
    round: int = 0,
    freeze_embedding: bool = False,
    freeze_head: bool = False,
    train: str | Sequence[str] = (),
    freeze: str | Sequence[str] = (),
    scores: Mapping[str, float] | None = None,
) -> Plan:
    """Draws the weight matrices of a LLaMA that train in one round; the others stay frozen, bit for bit.

    ``model`` is a transformers config, the contents or the path of a ``config.json`` (or its folder), or a shape. The
    other arguments are the ``--hft-`` options of the command line, which draws the same plan from the same values;
    ``train`` and ``freeze`` are patterns over Hugging Face's module names, and ``scores`` (a number by module name, for
    every attention and feed-forward matrix) is the ranking of ``selection="spectrum"``. Source of the method: Hui et
    al., arXiv 2404.18466. Raises ValueError for a model that is not a LLaMA, and for arguments that don't fit together.
    """
    choice = {
        "ratio": ratio,
        "level": level,
        "selection": selection,
        "counting": counting,
        "pairing": pairing,
        "rotation": rotation,
        "seed": seed,
        "freeze_embedding": freeze_embedding,
        "freeze_head": freeze_head,
    }
    for name, value in choice.items():
        check_choice(name, value)
    if not isinstance(round, int) or round < 0:
        raise ValueError(f"round={round!r} must be a whole number of at least 0.")
    if SELECTIONS[selection].needs_scores and scores is None:
        raise ValueError(f"selection={selection!r} ranks the matrices by scores; give them as scores.")
    patterns = {
        name: (value if isinstance(value, str) else ",".join(value)) or None
        for name, value in (("train", train), ("freeze", freeze))
    }
    config = HFTConfig(**{f"hft_{name}": value for name, value in (choice | patterns).items()})  # type: ignore[arg-type]
    try:
        shape = _shape_of(model)
        for rule in CHOICE_RULES:
            rule(RunConfig(hft=config), shape, 1)
        return make_plan(shape, config, default_seed=seed, round=round, scores=scores)
    except UserError as error:
        raise ValueError(in_arguments(str(error), of_plans=True)) from None


def in_arguments(sentence: str, *, of_plans: bool = False) -> str:
    """A sentence about options of the command line as one about arguments: ``--hft-ratio`` becomes ``hft_ratio``, or
    ``ratio`` for plans."""
    return _FLAG.sub(lambda flag: flag[1].removeprefix("hft-" if of_plans else "").replace("-", "_"), sentence)


def _shape_of(model: HasConfig | Mapping[str, Any] | str | PathLike[str] | ModelShape) -> ModelShape:
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, (str, PathLike)):
        path = Path(model)
        file = path / HF_CONFIG_FILE if path.is_dir() else path
        try:
            return ModelShape.from_hf_config(json.loads(file.read_text(encoding="utf-8")), str(file))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} cannot be read as a {HF_CONFIG_FILE}: {error}.") from None
    if isinstance(model, Mapping):
        return ModelShape.from_hf_config(model, "the config")
    if hasattr(model, "to_dict"):
        return ModelShape.from_hf_config(model.to_dict(), "the config")
    raise ValueError(
        f"a {type(model).__name__} is not a config; give model.config, a folder with a {HF_CONFIG_FILE}, or a shape."
    )
