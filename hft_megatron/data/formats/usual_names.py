"""What data sets call a prompt and its answer, where they don't use the names that the formats know."""

from collections.abc import Iterable

PROMPT_NAMES = ("prompt", "question", "query", "problem")
COMPLETION_NAMES = ("completion", "answer", "response", "solution")
"""What GSM8K, MetaMath and others call the halves of ``prompt-completion``. No format, since as often they mean a
conversation."""


def only_one_of(names: Iterable[str], keys: Iterable[str]) -> str | None:
    """The one of ``names`` that is among ``keys``; None where none or several are."""
    found = set(names) & set(keys)
    return found.pop() if len(found) == 1 else None
