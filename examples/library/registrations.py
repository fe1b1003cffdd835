"""A selection rule, a data format, a command and an objective of one's own, beside those of the project.

Run it in place of ``-m hft_megatron``: ``python examples/library/registrations.py --help``, ``... plan --load-hf MODEL
--hft-selection lower-half``, or with torchrun before it ``... doubled --load-hf MODEL --train-data-path rows.jsonl``.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hft_megatron.cli import main
from hft_megatron.cli.boundary import StatusFolder, show
from hft_megatron.cli.entry import COMMANDS, Command
from hft_megatron.config.data import DataConfig
from hft_megatron.config.names import Selection
from hft_megatron.data.formats import table
from hft_megatron.data.formats.completions import Completion
from hft_megatron.hft import rules
from hft_megatron.hft.policy import Draw, Policy
from hft_megatron.hft.units import Unit
from hft_megatron.methods import registry


class LowerHalf(rules.SelectionRule):
    """The lower half of the layers, and the units outside the layers."""

    def select(
        self, units: Sequence[Unit], *, policy: Policy, draw: Draw, scores: Mapping[str, float]
    ) -> frozenset[str]:
        """Names of the units that train; ``draw`` has the round's randomness, and ``scores`` are empty here."""
        layers = 1 + max(unit.layer for unit in units if unit.layer is not None)
        return frozenset(unit.name for unit in units if unit.layer is None or unit.layer < layers // 2)


def parse_question(row: Mapping[str, Any], place: str) -> table.Record:
    """Read a row ``{"q": ..., "a": ...}``; a ValueError is shown with file and line."""
    if not row["a"]:
        raise ValueError("the answer `a` is empty")
    return Completion(prompt=row["q"], completion=row["a"], place=place)


@dataclass(frozen=True, kw_only=True)
class CountOptions:
    """Options of the command."""

    up_to: int = 3
    """Number to count up to; it is left out."""


def count(options: CountOptions, status: StatusFolder) -> None:
    """Show the numbers below ``up_to``; ``status.use(folder)`` would write the outcome there as status.json."""
    show(" ".join(map(str, range(options.up_to))))


def load_doubled() -> Any:
    """Return a method with twice the next-token loss. Torch is imported here: options are checked without it."""
    from hft_megatron.methods import next_token
    from hft_megatron.methods.sft.data import read_sft_data
    from hft_megatron.trainer.method import Method, Objective

    def forward_step(batches: Iterator[Any], chunk: Any) -> tuple[Any, Any]:
        losses, reduce = next_token.forward_step(batches, chunk)
        return losses, lambda output: reduce(2 * output)

    objective = Objective(loss_name=next_token.LOSS, forward_step=forward_step, measure=next_token.measure)
    return Method(name="doubled", objective=lambda config: objective, read_data=read_sft_data)


def register_rule_and_format() -> None:
    """--hft-selection lower-half and --data-format question."""
    rules.register("lower-half", LowerHalf(), Selection(what="trains the lower half", without=("hft_level",)))
    table.register("question", table.Format(keys=("q", "a"), parse=parse_question))


def register_command() -> None:
    """``hft-megatron count``."""
    COMMANDS["count"] = Command(summary="count to a number", options=CountOptions, run=count)


def register_objective() -> None:
    """``hft-megatron doubled``."""
    registry.register(
        registry.Declaration(
            name="doubled",
            summary="train twice the loss",
            groups={"data": DataConfig},
            rules=registry.SUPERVISED_RULES,
            load=load_doubled,
        )
    )


if __name__ == "__main__":
    register_rule_and_format()
    register_command()
    register_objective()
    sys.exit(main())
