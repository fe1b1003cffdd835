"""What to write where a record is of no format, or not of the one that is asked for."""

import shlex
from collections.abc import Mapping
from typing import Any

from hft_megatron.data.formats.usual_names import COMPLETION_NAMES, PROMPT_NAMES, only_one_of

PAIR_LAYOUTS = (
    "a pair has `chosen` and `rejected`, and its prompt in `prompt`, `messages`, `conversations` or `instruction`, or "
    "in front of both answers"
)


def proposal(row: Mapping[str, Any]) -> str:
    """What to write, with the record's own keys where there is no doubt which are a conversation, or the prompt and its
    completion."""
    conversations = {key: known for key, value in row.items() if (known := _conversation_key(value))}
    if len(conversations) == 1:
        ((key, known),) = conversations.items()
        # What the option can't name, or nobody can read.
        if key.isprintable() and not {",", "="} & set(key):
            return f"Read it with --data-keys {shlex.quote(f'{key}={known}')}"
    prompt, completion = only_one_of(PROMPT_NAMES, row), only_one_of(COMPLETION_NAMES, row)
    if "instruction" in row and completion is not None:
        return f"Read it with --data-keys {completion}=output" + ",context=input" * ("context" in row)
    if prompt is None or completion is None:
        return "Say which keys are meant with --data-keys KEY=prompt,OTHER=completion"
    pairs = ((prompt, "prompt"), (completion, "completion"))
    return "Read it with --data-keys " + ",".join(f"{key}={name}" for key, name in pairs if key != name)


def _conversation_key(value: object) -> str | None:
    """The key that a format has such a list of messages under; None for anything else."""
    if not isinstance(value, list) or not value:
        return None
    for name, known in (("role", "messages"), ("from", "conversations")):
        if all(isinstance(turn, dict) and name in turn for turn in value):
            return known
    return None
