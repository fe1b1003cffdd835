"""Keys of a record that no format reads: those that are to be passed over, and those that would change its meaning."""

from collections.abc import Iterator, Sequence
from typing import Any

from hft_megatron.config.schema import DataFormat
from hft_megatron.data.formats.keys import Key, refusal_of
from hft_megatron.data.formats.preference import is_answer_alone, prompt_keys
from hft_megatron.errors import UserError


def without(ignored: frozenset[str], row: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The row without the ``ignored`` keys of its own and of its messages, and those that were there."""
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


def check_unread(key: str, row: dict[str, Any], unread: Sequence[str], place: str, format: DataFormat) -> None:
    """Raise UserError for a key by which the record would mean something else, unless it repeats what is read."""
    refusal = refusal_of(key, row[key], format)
    if refusal is None:
        return
    if refusal.may_be_a_copy and _is_repeated(refusal, row[key], row, unread, format):
        return
    if format == "preference" and key == "input" and prompt_keys(row) == ("system",) and is_answer_alone(row["chosen"]):
        raise UserError(
            f"{place}: `input` stands for the prompt of a pair, which must be in `prompt`; read it with --data-keys "
            f"input=prompt, or pass over it with --ignore-keys input."
        )
    raise UserError(
        f"{place}: `{key}` stands for {refusal.meaning}, which a record of the format {format} has no place for; "
        f"{refusal.fix}, or pass over it with --ignore-keys {key}."
    )


def _is_repeated(key: Key, value: object, row: dict[str, Any], unread: Sequence[str], format: DataFormat) -> bool:
    """Whether the value says nothing that what is read of the record doesn't."""
    read = {text for name in row if name not in unread for text in _texts(row[name])}
    texts = set(_texts(value))
    if texts and (texts <= read or (format == "text" and all(text in row["text"] for text in texts))):
        return True
    if key.may_be_within:
        return bool(texts) and any(all(text in other for text in texts) for other in read)
    return format == "alpaca" and isinstance(value, str) and _is_rendered(value, row)


def _is_rendered(text: str, row: dict[str, Any]) -> bool:
    """Whether the text is all of an instruction with its input and output, among the words of a prompt template."""
    parts = [row[name] for name in ("instruction", "input", "output") if isinstance(row.get(name), str)]
    return all(part.strip() for part in parts[:1]) and all(part in text for part in parts)


def _texts(value: object) -> Iterator[str]:
    """Every text in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
