"""Half Fine-Tuning of LLaMA models on megatron-core: a trainer, and plans for any other trainer."""

from typing import TYPE_CHECKING, Any

from hft_megatron.data.formats import table as _formats  # noqa: F401 (registers values of --data-format)
from hft_megatron.hft.plan import Plan
from hft_megatron.library.plans import draw_plan
from hft_megatron.methods import registry as _methods  # noqa: F401 (registers the commands that train)

if TYPE_CHECKING:
    from hft_megatron.library.trainer import Trainer
    from hft_megatron.trainer.loop import Hook

__version__ = "0.1.0"
__all__ = ["Hook", "Plan", "Trainer", "draw_plan"]


def __getattr__(name: str) -> Any:
    """Imports ``Trainer`` and ``Hook`` on first use, since torch and megatron-core come with them."""
    if name not in ("Trainer", "Hook"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    from hft_megatron.library.trainer import Trainer
    from hft_megatron.trainer.loop import Hook

    return Trainer if name == "Trainer" else Hook
