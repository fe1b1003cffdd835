"""Files with the plans of several rounds, which ``hft-megatron plan --save`` writes and ``--hft-plan`` reads."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan
from hft_megatron.hft.plan_record import PlanRecord, read_record, write_record


def plans_to_json(plans: Sequence[Plan]) -> str:
    """The text of a plan file: plans of one model and one policy, in the order of their rounds.

    One line per unit, whose ``trains`` a person may edit: true or false, in a list when there are several rounds.
    """
    first = plans[0]
    assert all((plan.policy, plan.units) == (first.policy, first.units) for plan in plans), "plans of one run"
    return write_record(
        PlanRecord(
            shape_fingerprint=first.shape_fingerprint,
            policy=first.policy,
            rounds=tuple(plan.round for plan in plans),
            units=first.units,
            training=tuple(plan.training for plan in plans),
        )
    )


def load_plans(path: str, shape: ModelShape) -> tuple[Plan, ...]:
    """The plans of a file, one per round, numbered from round 0 whatever their numbers in the file: a checkpoint's
    ``plan.json`` is one round of its run and the first of a new one.

    Raises ``UserError`` when the file cannot be read, is not a plan, does not fit the model (naming the first unit that
    does not), or has a round in which nothing trains.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file in UTF-8"
        raise UserError(
            f"--hft-plan {path} cannot be read ({reason}); give a file from `hft-megatron plan --save`."
        ) from None
    record = read_record(text, source=path)
    plans = (Plan.from_record(record, index, shape=shape, source=path) for index in range(len(record.rounds)))
    return tuple(replace(plan, round=round) for round, plan in enumerate(plans))


def check_enough_rounds(plans: Sequence[Plan], needed: int, path: str) -> None:
    """Raises ``UserError`` when a run of ``needed`` rounds is longer than its plan file."""
    if len(plans) < needed:
        raise UserError(
            f"--hft-plan {path} has {len(plans)} rounds, but the run needs {needed}; save a plan with "
            f"--rounds {needed} or choose a longer --hft-round-interval."
        )
