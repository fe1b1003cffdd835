"""Checks that all ranks have read the same inputs, before one of them waits for another."""

from dataclasses import asdict, dataclass
from itertools import zip_longest

from hft_megatron.config.declared import flag
from hft_megatron.config.run_identity import RunIdentity, differences
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan
from hft_megatron.parallel.consensus import gathered
from hft_megatron.parallel.groups import Placement, host_name
from hft_megatron.trainer.inputs import Inputs


def check_inputs_agree(inputs: Inputs, placement: Placement) -> None:
    """Raises the same UserError on every rank when a rank has another checkpoint, plan, model, data or option.

    Such ranks would wait for each other in different collectives until the time-out. Collective over all ranks.
    """
    everyone = gathered((f"{host_name()} ({placement.coordinates})", _read_by(inputs)))
    for rank, (where, theirs) in enumerate(everyone):
        difference = _first_difference(everyone[0][1], theirs)
        if difference is not None:
            raise UserError(
                f"rank {rank} on {where} found other inputs than rank 0: {difference}; every rank needs the same "
                f"options and must see the same --save, --load, model, plan and data: use storage that all hosts share."
            )


@dataclass(frozen=True, kw_only=True)
class _Read:
    """Description of the inputs of one rank, for the others."""

    options: dict[str, dict[str, object]]
    checkpoints: tuple[str, ...]
    """Newest first."""
    identity: RunIdentity
    plans: tuple[Plan, ...]
    valid: tuple[str, ...]
    """Sources of the validation data, with their digests."""
    tasks: tuple[str, ...]
    """Tasks of --eval-tasks, with their digests."""


def _read_by(inputs: Inputs) -> _Read:
    complete = () if inputs.found is None else tuple(path.name for path in inputs.found.complete)
    digests = {} if inputs.data is None else inputs.data.valid_digests
    return _Read(
        options=asdict(inputs.config),
        checkpoints=complete,
        identity=inputs.identity,
        plans=inputs.plans,
        valid=tuple(f"{name} (digest {digest[:12]})" for name, digest in digests.items()),
        tasks=tuple(f"{one.task.name} (digest {one.task.digest[:12]})" for one in inputs.tasks),
    )


def _first_difference(mine: _Read, theirs: _Read) -> str | None:
    """The first difference in words: the value there instead of the value here."""
    for group, options in mine.options.items():
        for name, value in options.items():
            other = theirs.options[group][name]
            if other != value:
                return f"{flag(name)} is {_as_written(other)} instead of {_as_written(value)}"
    for here, there in zip_longest(mine.checkpoints, theirs.checkpoints):
        if here != there:
            return f"the newest checkpoint is {there} instead of {here}"
    for ours, plan in zip(mine.plans, theirs.plans, strict=False):
        unit = ours.first_difference(plan)
        if unit is not None:
            return f"the plan of round {ours.round} in {mine.options['hft']['hft_plan']} differs first in {unit}"
    for here, there in zip_longest(mine.valid, theirs.valid):
        if here != there:
            return f"the validation data is {there} instead of {here}"
    for here, there in zip_longest(mine.tasks, theirs.tasks):
        if here != there:
            return f"the evaluation task is {there} instead of {here}"
    for what, our_value, their_value in differences(mine.identity, theirs.identity):
        return f"the {what} is {their_value} instead of {our_value}"
    return None


def _as_written(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value
