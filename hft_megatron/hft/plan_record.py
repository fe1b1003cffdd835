"""What the JSON form of a plan must look like: every field present, each of its type, each mistake one sentence."""

import json
from typing import Any

from hft_megatron.errors import UserError

FORMAT = 1
"""Version of the JSON form."""
FIX = "draw a new plan for this model."
"""How the messages about an unusable plan end."""

_HEADER_TYPES: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "shape_fingerprint": (str,),
    "ratio": (int, float),
    "seed": (int,),
    "round": (int,),
    "selection": (str,),
    "units": (list,),
}
_UNIT_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "layer": (int, type(None)),
    "category": (str,),
    "parameters": (int,),
    "trains": (bool,),
}


def read_record(text: str, *, source: str) -> dict[str, Any]:
    """Parse the JSON text of a plan, which a person may have edited, and check its form.

    ``source`` is the file or option, for messages. Raises ``UserError`` naming the line, the field or the unit.
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{source}:{error.lineno} is not JSON ({error.msg}); {FIX}") from error
    _check_fields(record, _HEADER_TYPES, where=source)
    if record["format"] != FORMAT:
        raise UserError(f"{source} has plan format {record['format']}, this version reads {FORMAT}; {FIX}")
    seen: set[str] = set()
    for position, row in enumerate(record["units"]):
        _check_fields(row, _UNIT_TYPES, where=f"{source} units[{position}]")
        if row["name"] in seen:
            raise UserError(f"{source} lists {row['name']} twice; {FIX}")
        seen.add(row["name"])
    assert isinstance(record, dict)
    return record


def _check_fields(record: Any, types: dict[str, tuple[type, ...]], *, where: str) -> None:
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object; {FIX}")
    if record.keys() != types.keys():
        odd = min(record.keys() ^ types.keys())
        raise UserError(f"{where} must have exactly the fields {', '.join(types)}, look at {odd}; {FIX}")
    for key, allowed in types.items():
        if type(record[key]) not in allowed:  # not isinstance: true is an int to Python
            raise UserError(f"{where} has {key} {record[key]!r}, which is of the wrong type; {FIX}")
