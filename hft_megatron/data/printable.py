"""Text from data files and templates as a person may safely see it, in sentences."""


def printable(text: str, *, keep: str = "") -> str:
    """``text`` with every character that doesn't print, other than those in ``keep``, as its escape (``\\x1b``).

    Data may hold codes that clear a terminal, or that turn the direction of what follows them.
    """
    return "".join(char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text)


def without_stop(text: str) -> str:
    """``text`` without what ends a sentence, so that another clause can follow; three dots stay."""
    text = text.rstrip()
    return text if text.endswith("...") else text.rstrip(" .!")


def as_sentence(clause: str) -> str:
    """``clause`` with one stop at its end: a template's own words may have another there."""
    text = without_stop(clause)
    return text if text.endswith("...") else f"{text}."
