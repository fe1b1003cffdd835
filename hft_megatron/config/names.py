"""Options whose values are names that registries add to: selections, layouts of records, methods, objectives.

Imports no torch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar


class _NamesType(type):
    def __instancecheck__(cls, value: object) -> bool:
        # The values are plain texts, which YAML and JSON know.
        return type(value) is str


class Names(str, metaclass=_NamesType):
    """Base of the types of such options; the type knows which names there are."""

    known: ClassVar[list[str]]


if TYPE_CHECKING:
    SelectionName = str
    DataFormat = str
    MethodName = str
    ObjectiveName = str
else:

    class SelectionName(Names):
        """A way to select what trains; ``hft.rules.register`` adds one."""

        known: ClassVar[list[str]] = []

    class DataFormat(Names):
        """A layout of records, in the order in which they are tried: a record with the keys of two is of the first.

        ``data.formats.table.register`` adds one.
        """

        known: ClassVar[list[str]] = []

    class MethodName(Names):
        """A way to train, and its command; ``methods.registry.register`` adds one."""

        known: ClassVar[list[str]] = []

    class ObjectiveName(Names):
        """An objective of fine-tuning; ``methods.objectives.registry.register`` adds one."""

        known: ClassVar[list[str]] = []


def known(kind: type[str]) -> list[str]:
    """The registered names of this type, in the order in which they were added."""
    assert issubclass(kind, Names)
    return kind.known


def add(kind: type[str], name: str) -> None:
    """Adds ``name`` to the values of options of this type."""
    names = known(kind)
    assert name not in names, f"{name} is registered twice"
    names.append(name)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Properties of a way to select that options and rounds need; its rule does the selecting."""

    what: str = ""
    """Its action, for a sentence: `ranks the matrices of every category`."""
    without: tuple[str, ...] = ()
    """Fields of HFTConfig that have no meaning with it."""
    needs_scores: bool = False
    """True if it ranks by scores of the weights that the run starts from."""
    is_of_rounds: bool = False
    """True if it may select other units in every round, so that a run of one round is a mistake."""


SELECTIONS: dict[str, Selection] = {}
"""Selections by name."""
