"""The words of --data-keys and --prompt-separator: what a record's keys mean, and what joins prompt and answer."""

from hft_megatron.config.schema import DataConfig
from hft_megatron.errors import UserError

KNOWN_KEYS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "answer",
    "chosen",
    "rejected",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "text",
)
"""The keys of a record that some format reads."""
DataKeys = tuple[tuple[str, str], ...]
"""(key of the records, key that the formats know), in the order of the first."""
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def data_keys(words: str | None) -> DataKeys:
    """What --data-keys maps. Raises UserError for a part that is no mapping, or a key that is there twice."""
    found: dict[str, str] = {}
    for part in [] if words is None else words.split(","):
        key, equals, known = (word.strip() for word in part.partition("="))
        if not (key and equals and known):
            raise UserError(f"--data-keys {words}: {part!r} is not KEY=NAME; write for example question=prompt.")
        if known not in KNOWN_KEYS:
            turned = f", such as {known}={key}: the record's key comes first" if key in KNOWN_KEYS else ""
            raise UserError(
                f"--data-keys {words}: {known!r} is no key that a format has; choose one of {', '.join(KNOWN_KEYS)}"
                f"{turned}."
            )
        if key in found or known in found.values():
            twice = key if key in found else known
            raise UserError(f"--data-keys {words}: {twice!r} is there twice; every key means one thing.")
        found[key] = known
    return tuple(sorted(found.items()))


def prompt_separator(words: str) -> str:
    r"""The text that --prompt-separator means: ``\n``, ``\t`` and ``\\`` are a line end, a tab and a backslash."""
    text, rest = "", words
    while rest:
        before, slash, rest = rest.partition("\\")
        text += before
        if slash:
            if rest[:1] not in _ESCAPES:
                raise UserError(
                    f"--prompt-separator {words}: a \\ stands before n, t or another \\; write \\\\ for one."
                )
            text, rest = text + _ESCAPES[rest[0]], rest[1:]
    return text


def check_record_options(data: DataConfig) -> None:
    """Raise UserError for words that mean nothing."""
    data_keys(data.data_keys)
    prompt_separator(data.prompt_separator)
