"""A worker of the acceptance run in which the product is broken on purpose.

Run: ``python tests/tools/planted_faults.py FAULT FOLDER``. One check runs as in ``acceptance.py --toy``, with its
events in ``FOLDER/events``.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "tools" / "gpu")]

from check_worker import run_checks  # noqa: E402
from working_site import Site  # noqa: E402


def weight_gradient() -> str:
    """A matrix' gradient is rounded to bf16, as it once was."""
    import torch

    from hft_megatron.model import linear

    def rounded(product: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: product(*(g.bfloat16().to(g.dtype) if isinstance(g, torch.Tensor) else g for g in given))

    backward = linear._SharedInput.backward
    linear._SharedInput.backward = staticmethod(  # type: ignore[method-assign]
        lambda ctx, *gradients: rounded(lambda *given: backward(ctx, *given))(*gradients)
    )
    return "check_kernels:weight_gradient"


def packed_attention() -> str:
    """Examples of a pack see each other."""
    from hft_megatron.model import torch_attention

    def as_one(query: Any, key: Any, value: Any, params: Any, scale: float | None) -> Any:
        return torch_attention._one_example(query, key, value, scale)

    torch_attention.packed_attention = as_one
    return "check_losses:losses"


def resume() -> str:
    """Adam's second moments come back from a checkpoint with an error."""
    from hft_megatron.trainer import assembly

    load = assembly.starting_state

    def off_by_a_little(inputs: Any, placement: Any, wrapped: Any, *others: Any) -> Any:
        state = load(inputs, placement, wrapped, *others)
        for moments in wrapped.shards.optimizer.state.values():
            if inputs.resumes:
                moments["exp_avg_sq"].mul_(1.001)
        return state

    assembly.starting_state = off_by_a_little
    return "check_saving:saving"


def audit() -> str:
    """The audit finds nothing."""
    from hft_megatron.hft.on_ranks import Audit

    Audit.verify = lambda self, *, coordinates: None  # type: ignore[method-assign]
    return "check_numbers:bf16_and_audit"


FAULTS = {function.__name__: function for function in (weight_gradient, packed_attention, resume, audit)}


def main() -> int:
    fault, folder = sys.argv[1], Path(sys.argv[2])
    from hft_megatron.engine.start import prepare_engine

    prepare_engine()
    site = Site(folder=folder, toy=True)
    return run_checks([{"name": fault, "target": FAULTS[fault](), "alone": ""}], site, folder / "events")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
