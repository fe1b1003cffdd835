"""Records from rows: a file's format, the keys that are used, and advice on records of another layout.

A file has one format: that of --data-format, or the one that its first record's keys identify.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hft_megatron.config.data import DataKeys
from hft_megatron.config.names import DataFormat
from hft_megatron.data.files.rows import Row, row_of
from hft_megatron.data.files.sources import find_rows
from hft_megatron.data.formats.completions import Completion
from hft_megatron.data.formats.conversations import Chat, PassedOver, kind_of, weighed_messages
from hft_megatron.data.formats.keys import Key, refusal_of
from hft_megatron.data.formats.preference import (
    COMPLETION_NAMES,
    PROMPT_NAMES,
    is_answer_alone,
    only_one_of,
    prompt_keys,
    weighed_pair,
)
from hft_megatron.data.formats.table import FORMATS, Format, Record, recognise
from hft_megatron.data.record_errors import RecordErrors, RecordUse, printable
from hft_megatron.errors import UserError

PAIR_LAYOUTS = (
    "a pair has `chosen` and `rejected`, and its prompt in `prompt`, `messages`, `conversations` or `instruction`, or "
    "in front of both answers"
)


def proposal(row: Mapping[str, Any]) -> str:
    """Advice with the record's own keys, where it is clear which are a conversation, or the prompt and its
    completion."""
    conversations = {key: known for key, value in row.items() if (known := _conversation_key(value))}
    if len(conversations) == 1:
        ((key, known),) = conversations.items()
        # The option cannot name these, or nobody can read them.
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
    """The key under which a format has such a list of messages; None for anything else."""
    if not isinstance(value, list) or not value:
        return None
    for name, known in (("role", "messages"), ("from", "conversations")):
        if all(isinstance(turn, dict) and name in turn for turn in value):
            return known
    return None


def without_nulls(row: dict[str, Any], *, at_any_depth: bool) -> dict[str, Any]:
    """The row without null keys, also in its messages and in the parts of their contents, where some tools write every
    key that any has.

    ``at_any_depth`` removes them everywhere in messages: Parquet has a null there for a missing value. Elsewhere a null
    argument of a tool is a value, which templates print.
    """
    if at_any_depth:
        return {key: _without_any_nulls(value) for key, value in row.items() if value is not None}
    return {key: _of_each(value, _message_without_nulls) for key, value in row.items() if value is not None}


def _of_each(value: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """``value`` with its object, or the objects in its list, changed."""
    if isinstance(value, list):
        return [change(entry) if isinstance(entry, dict) else entry for entry in value]
    return change(value) if isinstance(value, dict) else value


def _message_without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    kept = _object_without_nulls(message)
    if isinstance(kept.get("content"), list):
        kept["content"] = _of_each(kept["content"], _object_without_nulls)
    return kept


def _object_without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {key: inner for key, inner in value.items() if inner is not None}


def _without_any_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_any_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_any_nulls(inner) for inner in value] if isinstance(value, list) else value


def without(ignored: frozenset[str], row: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The row without the ``ignored`` keys of its own and of its messages, and the keys that were removed."""
    if not ignored:
        return row, ()
    found = ignored & row.keys()
    kept: dict[str, Any] = {}
    for key in row.keys() - found:
        turns = row[key] if isinstance(row[key], list) else [row[key]]
        found |= {name for turn in turns if isinstance(turn, dict) for name in turn.keys() & ignored}
        rest = [_but(turn, ignored) for turn in turns]
        kept[key] = rest if isinstance(row[key], list) else rest[0]
    return {key: kept[key] for key in row if key in kept}, tuple(sorted(found))


def _but(turn: Any, ignored: frozenset[str]) -> Any:
    return {key: value for key, value in turn.items() if key not in ignored} if isinstance(turn, dict) else turn


def _unread(row: dict[str, Any], format: Format) -> tuple[str, ...]:
    """The row's keys that its format doesn't read."""
    reads = format.reads if format.reads_of is None else format.reads_of(row)
    return tuple(key for key in row if key not in (*format.keys, *reads))


def check_unread(key: str, row: dict[str, Any], unread: Sequence[str], place: str, format: DataFormat) -> None:
    """Raise UserError for a key that changes the record's meaning, unless it repeats what is read."""
    refusal = refusal_of(key, row[key], format)
    if refusal is None:
        return
    if refusal.may_be_a_copy and _is_repeated(refusal, row[key], row, unread, format):
        return
    if format == "preference" and key == "input" and prompt_keys(row) == ("system",) and is_answer_alone(row["chosen"]):
        raise UserError(
            f"{place}: `input` is the prompt of a pair, which must be in `prompt`; read it with --data-keys "
            f"input=prompt, or ignore it with --ignore-keys input."
        )
    raise UserError(
        f"{place}: `{key}` means {refusal.meaning}, which a record of the format {format} cannot have; "
        f"{refusal.fix}, or ignore it with --ignore-keys {key}."
    )


def _is_repeated(key: Key, value: object, row: dict[str, Any], unread: Sequence[str], format: DataFormat) -> bool:
    """True if everything in the value is also in the keys that are read."""
    read = {text for name in row if name not in unread for text in _texts(row[name])}
    texts = set(_texts(value))
    if texts and (texts <= read or (format == "text" and all(text in row["text"] for text in texts))):
        return True
    if key.may_be_within:
        return bool(texts) and any(all(text in other for text in texts) for other in read)
    return format == "alpaca" and isinstance(value, str) and _is_rendered(value, row)


def _is_rendered(text: str, row: dict[str, Any]) -> bool:
    """True if the text is a whole instruction with its input and output, within a prompt template's words."""
    parts = [row[name] for name in ("instruction", "input", "output") if isinstance(row.get(name), str)]
    return all(part.strip() for part in parts[:1]) and all(part in text for part in parts)


def _texts(value: object) -> Iterator[str]:
    """Every text in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The format of a file."""

    format: DataFormat
    since: str = ""
    """Place of the record that identified it; empty where --data-format gives it."""


@dataclass(frozen=True, kw_only=True)
class RecordRules:
    """Rules that decide, besides its keys, the meaning of a row."""

    data_format: DataFormat | None = None
    """Format of all files; recognised file by file when None."""
    data_keys: DataKeys = ()
    prompt_separator: str = ""
    """Text between a prompt and its answers where both are separate texts."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of records and messages to ignore, as if they were missing."""


class RecordReader:
    """Makes rows into records, and keeps account of the rules that had an effect."""

    def __init__(self, rules: RecordRules) -> None:
        self._rules = rules
        self._names = dict(rules.data_keys)
        self._found_keys: set[str] = set()
        self._joined = False
        """True if a record has the separator in it."""

    def use(self) -> RecordUse:
        """Effects of the rules so far."""
        keys = tuple((key, known) for key, known in self._rules.data_keys if key in self._found_keys)
        return RecordUse(keys=keys, separator=self._rules.prompt_separator if self._joined else "")

    def read(self, files: Sequence[Path], errors: RecordErrors | None = None) -> Iterator[tuple[DataFormat, Record]]:
        """Each record of each file in order, with its format.

        Raises UserError naming file and place for a bad record, or adds it to ``errors``. A file that cannot be read
        to its end, or whose first record is unreadable or of no format, ends the reading in any case.
        """
        for path in files:
            layout = None if self._rules.data_format is None else Layout(format=self._rules.data_format)
            for found in find_rows(path):
                try:
                    row = row_of(found.item)
                    layout = layout or self.layout_of(row)
                    record = self.record_of(row, layout)
                except UserError as error:
                    if errors is None or layout is None:
                        raise
                    errors.add(found.item.place, error)
                else:
                    yield layout.format, record

    def layout_of(self, row: Row) -> Layout:
        """The format that the row's keys identify. Raises UserError if there is none."""
        value, _ = self._read_keys(row)
        known = recognise(value)
        if known is None:
            accepted = "; ".join(format.needs for format in FORMATS.values())
            raise UserError(
                f"{row.place}: the record has {_keys_in_words(row.value)}, which is no known format: {accepted}. "
                f"{proposal(row.value)}."
            )
        return Layout(format=known, since=row.place)

    def record_of(self, row: Row, layout: Layout) -> Record:
        """The row as a record of its file's format, with the keys that were not read.

        Raises UserError naming its place, also for a key that changes the record's meaning.
        """
        value, ignored = self._read_keys(row)
        format = FORMATS[layout.format]
        if row.kind == "table":
            value = {key: cell for key, cell in value.items() if cell != "" or key in format.keys}
        if not value.keys() >= set(format.keys):
            raise UserError(_other_keys(row, layout))
        unread = _unread(value, format)
        try:
            for key in unread:
                check_unread(key, value, unread, row.place, layout.format)
            record = weigh(format.parse(value, row.place))
        except UserError as error:
            raise UserError(self._in_users_names(str(error))) from error
        except ValueError as error:  # from a registered parser
            raise UserError(f"{row.place}: as {layout.format} {error}.") from error
        return self._with_separator(replace(record, keys=PassedOver(unread=unread, ignored=ignored)))

    def _read_keys(self, row: Row) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The row's keys that are not null, under the formats' names and without ignored keys, and the ignored keys
        of the row or its messages."""
        if not isinstance(row.value, dict):
            raise UserError(f"{row.place}: the record is {kind_of(row.value)}, but it must be an object with keys.")
        value, ignored = without(
            frozenset(self._rules.ignore_keys), without_nulls(row.value, at_any_depth=row.kind == "parquet")
        )
        return self._renamed(value, row.place), ignored

    def _renamed(self, value: dict[str, Any], place: str) -> dict[str, Any]:
        mapped = {key: known for key, known in self._names.items() if key in value}
        for key, known in mapped.items():
            if known not in mapped and known in value:
                raise UserError(
                    f"{place}: the record has the key `{known}` as well as `{key}`, which --data-keys maps to it; "
                    f"map one of them to another name, or leave {key}={known} out."
                )
        self._found_keys |= mapped.keys()
        renamed = {key: inner for key, inner in value.items() if key not in mapped}
        return renamed | {known: value[key] for key, known in mapped.items()}

    def _in_users_names(self, sentence: str) -> str:
        """The sentence with the records' own keys in its advice on options, and at its end those of its keys that have
        other names in the records."""
        own = {known: key for key, known in self._names.items()}
        told = _OPTION_OF_KEY.sub(lambda found: found[1] + own.get(found[2], found[2]), sentence)
        named = [f"`{known}` is `{key}`" for key, known in self._names.items() if f"`{known}`" in told]
        return f"{told.removesuffix('.')} ({', '.join(named)} by --data-keys)." if named else told

    def _with_separator(self, record: Record) -> Record:
        separator = self._rules.prompt_separator
        if not separator or isinstance(record, Chat) or not record.prompt or not isinstance(record.prompt, str):
            return record
        joined = record.prompt + separator
        one_text = record.repeated if isinstance(record, Completion) else record.form in ("stripped", "found")
        if not one_text:
            self._joined = True
            return replace(record, prompt=joined)
        # Prompt and answers were already one text: the characters between them belong to the prompt.
        names = ("completion",) if isinstance(record, Completion) else ("chosen", "rejected")
        answers: dict[str, Any] = {name: getattr(record, name) for name in names}
        if not all(answer.startswith(separator) for answer in answers.values()):
            return record
        self._joined = True
        return replace(record, prompt=joined, **{name: text.removeprefix(separator) for name, text in answers.items()})


_OPTION_OF_KEY = re.compile(r"(--(?:data|ignore)-keys )(\w+)")
"""An option in a sentence, and the record's key that it takes."""


def _other_keys(row: Row, layout: Layout) -> str:
    found = f"{row.place}: the record has {_keys_in_words(row.value)}"
    needed = f"the format {layout.format} needs {FORMATS[layout.format].needs}"
    if layout.since:
        return (
            f"{found}, but {needed}, the format of the file since {layout.since}; put records of another format into a "
            f"separate file."
        )
    if layout.format == "preference":  # dpo asks for it without an option
        return (
            f"{found}, but {PAIR_LAYOUTS}; name the keys that hold the answers with --data-keys "
            f"KEY=chosen,OTHER=rejected, or correct the record."
        )
    return f"{found}, but {needed}; correct --data-format or the record."


def _keys_in_words(row: Mapping[str, Any]) -> str:
    shown = [f"`{printable(key[:40])}`{' (null)' * (row[key] is None)}" for key in list(row)[:10]]
    shown += ["..."] * (len(row) > 10)
    return "the keys " + ", ".join(shown) if shown else "no keys"


def weigh(record: Record) -> Record:
    """The record without the weights of turns in its messages, and without empty lists; a conversation with the effect
    of the weights.

    Raises UserError naming the message for a value that is neither yes nor no, for keys that contradict each other, for
    a turn to be trained that is not the assistant's, and for an answer of a pair that is not to be trained.
    """
    if isinstance(record, Completion):
        return record
    if isinstance(record, Chat):
        messages, untrained = weighed_messages(record.messages, record.place)
        return replace(record, messages=messages, untrained=untrained)
    return weighed_pair(record)
