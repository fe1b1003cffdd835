"""Text from data files and templates as a person may safely see it."""


def printable(text: str, *, keep: str = "") -> str:
    """``text`` with every character that doesn't print, other than those in ``keep``, as its escape (``\\x1b``).

    Data may hold codes that clear a terminal, or that turn the direction of what follows them.
    """
    return "".join(char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text)
