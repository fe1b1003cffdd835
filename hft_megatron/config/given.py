"""What answers to wrong options go by: what a command is given and could be given, and what other commands could."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

LEAVE = "leave it out"
_NAMED_COMMANDS = 3
"""Number of commands that an answer names at most."""
_QUOTED = re.compile(r"`[^`]*`")
_OPTION = re.compile(r"--([a-z][a-z0-9-]*[a-z0-9])")


@dataclass(frozen=True, kw_only=True)
class Given:
    """What is known of a command while its options are read."""

    values: Mapping[str, str] = field(default_factory=dict)
    """Values of all that is given, by name with dashes."""
    options: Collection[str] = ()
    """Names of the command's own options."""
    others: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Names of the options of every command, by command."""

    def elsewhere(self, name: str) -> str | None:
        """The end of a sentence about an option, by name, that other commands have; None for any other name."""
        names = {name, name.removeprefix("no-")}
        having = [f"`{command}`" for command, options in self.others.items() if _any(names, options)][:_NAMED_COMMANDS]
        if not having or _any(names, self.options):
            return None
        *most, last = having
        commands = f"{', '.join(most)} and {last}" if most else last
        return f"is an option of {commands.replace('`', '`hft-megatron ', 1)}, not of this command"

    def fitting(self, answer: str) -> str:
        """An answer, without a full stop, that fits the command: of the options it names, those of others are told."""
        # What is in backticks is a command of its own.
        named = dict.fromkeys(_OPTION.findall(_QUOTED.sub("", answer)))
        lacking = list(self._lacking(named))
        if not lacking:
            return answer
        return "; ".join([*lacking, LEAVE] if len(lacking) == len(named) else [answer, *lacking])

    def _lacking(self, names: Collection[str]) -> Iterator[str]:
        for name in names:
            elsewhere = self.elsewhere(name)
            if elsewhere is not None:
                yield f"--{name} {elsewhere}"


def _any(names: Collection[str], options: Collection[str]) -> bool:
    return any(name in options for name in names)


ANY_RUN = Given()
"""No command in particular, so that every option of a run fits."""
