"""The JSON form of plans, and its checks, each mistake one sentence. One round or several share one form.

``trains`` of a unit is true or false in a file of one round, and a list of these, one per round, in a file of several.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hft_megatron.errors import UserError
from hft_megatron.hft.policy import Policy
from hft_megatron.hft.units import Unit

FORMAT = 2
"""Version of the JSON form."""
FIX = "draw a new plan for this model."
"""End of the messages about an unusable plan."""

_HEADER_TYPES: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "shape_fingerprint": (str,),
    "policy": (dict,),
    "rounds": (list,),
    "units": (list,),
}
_UNIT_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "layer": (int, type(None)),
    "category": (str,),
    "parameters": (int,),
    "trains": (bool, list),
}


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """The plans of one file, of well-formed fields; ``Plan.check_fits`` checks whether they fit a model."""

    shape_fingerprint: str
    policy: Policy
    rounds: tuple[int, ...]
    units: tuple[Unit, ...]
    training: tuple[frozenset[str], ...]
    """Names of the units that train, per round."""


def write_record(record: PlanRecord) -> str:
    """The canonical JSON text: one line per unit, so that a person can read it, edit ``trains`` and diff it."""
    return "\n".join(_lines(record)) + "\n"


def _lines(record: PlanRecord) -> Iterator[str]:
    header = {
        "format": FORMAT,
        "shape_fingerprint": record.shape_fingerprint,
        "policy": record.policy.to_dict(),
        "rounds": list(record.rounds),
    }
    yield "{"
    for key, value in header.items():
        yield f"  {json.dumps(key)}: {json.dumps(value)},"
    yield '  "units": ['
    for position, unit in enumerate(record.units):
        trains = [unit.name in training for training in record.training]
        row = {
            "name": unit.name,
            "layer": unit.layer,
            "category": unit.category,
            "parameters": unit.parameters,
            "trains": trains[0] if len(trains) == 1 else trains,
        }
        yield f"    {json.dumps(row)}{',' if position + 1 < len(record.units) else ''}"
    yield "  ]"
    yield "}"


def read_record(text: str, *, source: str) -> PlanRecord:
    """Parse the JSON text of plans, which a person may have edited, and check its form.

    ``source`` is the file or option, for messages. Raises ``UserError`` naming the line, the field or the unit.
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{source}:{error.lineno} is not JSON ({error.msg}); {FIX}") from error
    if isinstance(record, dict) and record.get("format", FORMAT) != FORMAT:
        raise UserError(f"{source} has plan format {record['format']}, but this version reads {FORMAT}; {FIX}")
    _check_fields(record, _HEADER_TYPES, where=source)
    rounds = record["rounds"]
    if not rounds or any(type(number) is not int or number < 0 for number in rounds):
        raise UserError(f"{source} has rounds {rounds}, which must be a list of round numbers; {FIX}")
    seen: set[str] = set()
    for position, row in enumerate(record["units"]):
        _check_fields(row, _UNIT_TYPES, where=f"{source} units[{position}]")
        if row["name"] in seen:
            raise UserError(f"{source} lists {row['name']} twice; {FIX}")
        seen.add(row["name"])
    return PlanRecord(
        shape_fingerprint=record["shape_fingerprint"],
        policy=Policy.from_dict(record["policy"], source=source),
        rounds=tuple(rounds),
        units=tuple(Unit(**{key: value for key, value in row.items() if key != "trains"}) for row in record["units"]),
        training=_training(record["units"], len(rounds), source=source),
    )


def _training(rows: Sequence[Mapping[str, Any]], rounds: int, *, source: str) -> tuple[frozenset[str], ...]:
    training: list[set[str]] = [set() for _ in range(rounds)]
    for row in rows:
        trains = row["trains"] if isinstance(row["trains"], list) else [row["trains"]]
        if len(trains) != rounds or any(type(value) is not bool for value in trains):
            wanted = "true or false" if rounds == 1 else f"a list of {rounds} values, true or false for each round"
            raise UserError(
                f"{source} has `trains` {json.dumps(row['trains'])} for {row['name']}; it must be {wanted}."
            )
        for names, value in zip(training, trains, strict=True):
            if value:
                names.add(row["name"])
    return tuple(frozenset(names) for names in training)


def _check_fields(record: Any, types: dict[str, tuple[type, ...]], *, where: str) -> None:
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object; {FIX}")
    if record.keys() != types.keys():
        odd = min(record.keys() ^ types.keys())
        raise UserError(f"{where} must have exactly the fields {', '.join(types)} (check {odd}); {FIX}")
    for key, allowed in types.items():
        if type(record[key]) not in allowed:  # not isinstance: true is an int to Python
            raise UserError(f"{where} has {key} {record[key]!r}, which is of the wrong type; {FIX}")
