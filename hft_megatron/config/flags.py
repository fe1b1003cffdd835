"""The options of a command as a flat table, and the words of a command line as settings of that table.

tyro parses the values; this file decides what an option is called and words what is wrong with a name.
"""

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from hft_megatron.config.names import Names, known
from hft_megatron.errors import UserError

CONSTRUCTORS = tyro.constructors.ConstructorRegistry()
"""How tyro makes values of types that are not its own."""


@CONSTRUCTORS.primitive_rule
def _names_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[str] | None:
    """Values of the types of ``config.names``: what is registered when a command line is read."""
    kind = info.type
    if not (isinstance(kind, type) and issubclass(kind, Names)):
        return None
    names = tuple(known(kind))
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(names)}}}",
        choices=names,
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    )


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One option: a leaf of the (nested) options dataclass."""

    name: str
    """As on the command line, without the leading dashes: ``micro-batch-size``."""
    type: Any
    """Of its value; None, for unset, is left out."""
    group: str | None
    """Name of the nested dataclass that holds it; None for what only the command line can say (--config)."""

    @property
    def is_switch(self) -> bool:
        """Written ``--name`` or ``--no-name``, without a value."""
        return self.type is bool

    @property
    def takes_several(self) -> bool:
        """Written ``--name VALUE VALUE``: all words up to the next option are its value."""
        return get_origin(self.type) is tuple

    @property
    def expected(self) -> str:
        """What its value must be, in words for an error."""
        if self.takes_several:
            return "one or more words"
        if get_origin(self.type) is Literal:
            return "one of " + ", ".join(str(choice) for choice in get_args(self.type))
        if isinstance(self.type, type) and issubclass(self.type, Names):
            return "one of " + ", ".join(known(self.type))
        return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[self.type]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One option set once, by a word of the command line or a line of a file."""

    flag: Flag
    words: tuple[str, ...]
    """As written; ``True`` or ``False`` for a switch. More than one only where the option takes several."""
    where: str
    """How an error calls it: ``--lr``, or ``run.yaml:3: lr``."""

    @property
    def value(self) -> str:
        """The words as one."""
        return " ".join(self.words)

    @property
    def arguments(self) -> list[str]:
        """Words for tyro, in the form that no value (empty, or with leading dashes) can be misread in."""
        if self.flag.is_switch:
            return [f"--{'' if self.value == 'True' else 'no-'}{self.flag.name}"]
        return [f"--{self.flag.name}={word}" for word in self.words]


def flags_of(options_type: type, group: str | None = None) -> dict[str, Flag]:
    """Every option of a dataclass of dataclasses, by its flat name."""
    assert is_dataclass(options_type)
    hints = get_type_hints(options_type)
    found: dict[str, Flag] = {}
    for field in fields(options_type):
        kind = _without_none(hints[field.name])
        if is_dataclass(kind):
            assert isinstance(kind, type)
            inner = flags_of(kind, group=field.name)
        else:
            name = field.name.replace("_", "-")
            inner = {name: Flag(name=name, type=kind, group=group)}
        assert not found.keys() & inner.keys(), "two options have one name"
        found |= inner
    return found


ALWAYS_ON = {
    "use-distributed-optimizer": "the distributed optimizer",
    "use-mcore-models": "megatron-core's model",
    "use-flash-attn": "attention without a score matrix",
    "swiglu": "SwiGLU",
    "group-query-attention": "grouped-query attention, with as many groups as the model has,",
    "normalization": "RMSNorm",
    "position-embedding-type": "rotary position embedding",
    "use-rotary-position-embeddings": "rotary position embedding",
    "use-rope-scaling": "the model folder's rotary scaling",
    "disable-bias-linear": "linear layers without bias",
    "attention-dropout": "zero dropout",
    "hidden-dropout": "zero dropout",
    "accumulate-allreduce-grads-in-fp32": "gradient accumulation in fp32",
    "no-gradient-accumulation-fusion": "accumulation of weight gradients in fp32, by one kernel where there is one,",
    "ckpt-format": "the torch_dist checkpoint format",
    "use-dist-ckpt": "the torch_dist checkpoint format",
    "dist-ckpt-optim-fully-reshardable": "a fully reshardable optimizer checkpoint",
    "sft": "the command's own method",
    "exit-signal-handler": "the signal handler",
}
"""Megatron's options that a LLaMA script brings along and that leave nothing to choose here.

All are refused alike, whatever their value: accepting ``--normalization LayerNorm`` would be a lie.
"""


def unknown_option(where: str, name: str, flags: Mapping[str, Flag]) -> UserError:
    """The sentence for a name that is no option; ``where`` is how the user wrote it."""
    if name in ALWAYS_ON:
        return UserError(f"{where}: {ALWAYS_ON[name]} is always used here; remove this option.")
    names = [*flags, *(f"no-{flag.name}" for flag in flags.values() if flag.is_switch)]
    # A name that only lacks its beginning, such as Megatron's --data-path, is nearer than letters tell.
    nearest = [known for known in names if known.endswith(f"-{name}")]
    nearest += difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"the nearest is --{nearest[0]}" if nearest else "--help lists all of them"
    return UserError(f"{where} is not an option; {hint}.")


def settings_from_arguments(arguments: Sequence[str], flags: Mapping[str, Flag]) -> Iterator[Setting]:
    """The settings of a command line, in order; ``-`` and ``_`` in names are the same.

    Raises UserError for a name that is no option, a value that is missing, and a word that belongs to no option.
    """
    words = iter(range(len(arguments)))
    for position in words:
        word = arguments[position]
        if not word.startswith("--") or word == "--":
            raise UserError(
                f"The word {word!r} belongs to no option: options start with -- and take at most one value"
                f"{_except_for_those_with_several(flags)}."
            )
        written, has_value, value = word.partition("=")
        name = written[2:].replace("_", "-")
        positive = name.removeprefix("no-") if name not in flags else name
        flag = flags.get(positive)
        if flag is None or (positive != name and not flag.is_switch):
            raise unknown_option(written, name, flags)
        if flag.is_switch:
            if has_value:
                raise UserError(f"{word}: a switch takes no value; write --{flag.name} or --no-{flag.name}.")
            yield Setting(flag=flag, words=(str(positive == name),), where=written)
            continue
        values = [value] if has_value else []
        while not values or flag.takes_several:
            if position + 1 == len(arguments) or arguments[position + 1].startswith("--"):
                break
            position = next(words)
            values.append(arguments[position])
        if not values:
            raise UserError(f"{written} needs a value: {flag.expected}.")
        yield Setting(flag=flag, words=tuple(values), where=written)


def _except_for_those_with_several(flags: Mapping[str, Flag]) -> str:
    names = [f"--{flag.name}" for flag in flags.values() if flag.takes_several]
    return f", except for {' and '.join(names)}" if names else ""


def _without_none(hint: Any) -> Any:
    """``T`` of ``T`` or ``T | None``."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    kept = [choice for choice in get_args(hint) if choice is not type(None)]
    assert len(kept) == 1, "an option has one type"
    return kept[0]
