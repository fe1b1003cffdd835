"""Every layout of a record: its identifying keys, and its parser."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hft_megatron.config.names import DataFormat, add
from hft_megatron.data.formats.completions import (
    Completion,
    parse_input_output,
    parse_prompt_completion,
    parse_text,
    parse_trace,
)
from hft_megatron.data.formats.conversations import Chat, parse_alpaca, parse_messages, parse_sharegpt
from hft_megatron.data.formats.preference import Preference, is_answer_alone, parse_preference, prompt_keys

Record = Chat | Completion | Preference
"""Result of parsing a row, whatever its layout."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One layout."""

    keys: tuple[str, ...]
    """Keys that a record of it has."""
    reads: tuple[str, ...] = ()
    """Keys that it may have, and that the parser reads as well."""
    reads_of: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None
    """The keys of ``reads`` that are read of a row, where some replace others; all of them when None."""
    parse: Callable[[Mapping[str, Any], str], Record]
    """Takes a row with these keys and its place."""

    @property
    def needs(self) -> str:
        """The keys in words."""
        return " and ".join(f"`{key}`" for key in self.keys)


FORMATS: dict[DataFormat, Format] = {}
"""Layouts by name, in the order in which they are tried: a record with the keys of two has the first one."""


def register(name: DataFormat, format: Format) -> None:
    """Adds a layout, which becomes a value of --data-format and is recognised by its keys, after all others."""
    FORMATS[name] = format
    add(DataFormat, name)


# The special before the general: many sets carry a rendered ``text``, or a ``prompt``, beside its sources.
register("messages", Format(keys=("messages",), parse=parse_messages))
register(
    "preference",
    Format(
        keys=("chosen", "rejected"),
        reads=("prompt", "conversations", "messages", "instruction", "input", "history", "system"),
        reads_of=prompt_keys,
        parse=parse_preference,
    ),
)
register("sharegpt", Format(keys=("conversations",), reads=("system",), parse=parse_sharegpt))
register("alpaca", Format(keys=("instruction", "output"), reads=("input", "system", "history"), parse=parse_alpaca))
register("prompt-completion", Format(keys=("prompt", "completion"), parse=parse_prompt_completion))
register("trace", Format(keys=("prompt", "answer"), parse=parse_trace))
register("input-output", Format(keys=("input", "output"), parse=parse_input_output))
register("text", Format(keys=("text",), parse=parse_text))


def recognise(row: Mapping[str, Any]) -> DataFormat | None:
    """The first format whose keys the row has.

    ``messages`` beside two lists that hold their prompts repeat one of them, but beside two answers alone they are the
    prompt.
    """
    is_ranking = all(is_answer_alone(row.get(key)) for key in ("chosen", "rejected"))
    formats = [name for name, format in FORMATS.items() if row.keys() >= set(format.keys)]
    return next((name for name in formats if name != "messages" or not is_ranking), None)
