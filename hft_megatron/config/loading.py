"""Options from a YAML file and the command line: the command line wins, then the file, then the defaults.

tyro parses the values; this file decides what an option is called and words what is wrong with a name.

Both become settings of one flat table and go through one parser (tyro), so that a value means the same in either.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from hft_megatron.config.run_folder import write_atomically
from hft_megatron.config.schema import RunConfig
from hft_megatron.errors import UserError


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


T = TypeVar("T")

CONFIG_FLAG = "config"
"""The option that names a YAML file, in every command that has it."""

_RESOLVED_HEADER = (
    "# Every option of the run with its value; `--config` with it and other output folders repeats the run.\n"
)
_TYRO_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
_TYRO_WORDS = (*_TYRO_CONFIG, tyro.conf.UseAppendAction)
"""For parsing: an option that takes several words comes as one ``--name=word`` per word."""
_METHOD = "method"
_YAML_NULL = "tag:yaml.org,2002:null"
_YAML_BOOL = "tag:yaml.org,2002:bool"


def help_text(options_type: type, *, prog: str, description: str) -> str:
    """What ``--help`` shows: every option with its default, in the groups of the dataclass."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(options_type, args=["--help"], prog=prog, description=description, config=_TYRO_CONFIG)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def load_options(options_type: type[T], arguments: Sequence[str]) -> T:
    """Build ``options_type``, a frozen dataclass of dataclasses, from command-line words and the file they name.

    The file may set any option of a run, so that one file serves every command: what nested dataclasses of
    ``options_type`` hold is taken, other options of a run are passed over. The outermost fields (--config itself)
    belong to the command line. Every mistake raises UserError with one sentence.
    """
    flags = flags_of(options_type)
    given = list(settings_from_arguments(arguments, flags))
    file = next((setting.value for setting in reversed(given) if setting.flag.name == CONFIG_FLAG), None)
    from_file = []
    if file is not None:
        taken = {name for name, flag in flags.items() if flag.group is not None}
        every = _settings_from_file(Path(file), flags_of(RunConfig) | {name: flags[name] for name in taken})
        from_file = [setting for setting in every if setting.flag.name in taken]
    # A later setting replaces an earlier one: an option repeated after a script's own arrays wins.
    settings = {setting.flag.name: setting for setting in [*from_file, *given]}
    return _build(options_type, list(settings.values()))


def options_of(options_type: type[T], values: Mapping[str, Any]) -> T:
    """Build ``options_type`` from Python values by name (``micro_batch_size``); None leaves an option unset.

    Raises UserError for a name that is no option and for a value that none can have.
    """
    flags, settings = flags_of(options_type), []
    for written, value in values.items():
        name = written.replace("_", "-")
        if name not in flags:
            raise unknown_option(written, name, flags)
        if value is not None:
            words = tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),)
            settings.append(Setting(flag=flags[name], words=words, where=written))
    return _build(options_type, settings)


def write_resolved(config: RunConfig, path: Path) -> None:
    """Write every option with its value as YAML that ``--config`` reads, atomically."""
    write_atomically(path, _RESOLVED_HEADER + yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))


def read_resolved(path: Path) -> RunConfig:
    """The inverse of ``write_resolved``; UserError when the file is missing or was edited into something else."""
    return _build(RunConfig, list(_settings_from_file(path, flags_of(RunConfig))))


def stages_of_file(path: Path, base: RunConfig) -> Iterator[tuple[str, int, RunConfig]]:
    """The method, the line and the options of every stage of a YAML list: ``base`` with what the stage sets.

    Raises UserError naming file and line for what is no list of stages, or no option.
    """
    root = _yaml_of_file(path, "--stages")
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        raise UserError(f"--stages {path}: the file must hold a list of stages, each `- method: ...` and its options.")
    for node in root.value:
        line = node.start_mark.line + 1
        named = dict[str, yaml.Node]()
        if isinstance(node, yaml.MappingNode):
            named = {key.value: value for key, value in node.value if key.value == _METHOD}
        if not isinstance(node, yaml.MappingNode) or not isinstance(named.get(_METHOD), yaml.ScalarNode):
            raise UserError(f"{path}:{line}: a stage must begin with `method:`, such as `- method: sft`.")
        node.value = [(key, value) for key, value in node.value if key.value != _METHOD]
        settings = _once_each(_settings_of_mapping(node, path, flags_of(RunConfig)))
        yield named[_METHOD].value, line, _with(base, list(settings))


def _with(base: RunConfig, settings: Sequence[Setting]) -> RunConfig:
    options = _build(RunConfig, settings)
    for setting in settings:
        group, name = setting.flag.group, setting.flag.name.replace("-", "_")
        assert group is not None
        value = getattr(getattr(options, group), name)
        base = replace(base, **{group: replace(getattr(base, group), **{name: value})})
    return base


def _build(options_type: type[T], settings: Sequence[Setting]) -> T:
    options = _parsed(options_type, settings)
    if options is not None:
        return options
    for setting in settings:
        if _parsed(options_type, [setting]) is None:
            shown = setting.value or "''"
            raise UserError(f"{setting.where} {shown}: the value must be {setting.flag.expected}.")
    raise AssertionError("tyro refused options that it accepts one by one")


def _parsed(options_type: type[T], settings: Sequence[Setting]) -> T | None:
    """The options, or None where tyro refuses a value; its own report would be a box of many lines."""
    words = [argument for setting in settings for argument in setting.arguments]
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return tyro.cli(options_type, args=words, config=_TYRO_WORDS)
        except SystemExit:
            return None


def _settings_from_file(path: Path, flags: Mapping[str, Flag]) -> Iterator[Setting]:
    """The settings of a YAML file: options by name, flat or under the name of their group."""
    root = _yaml_of_file(path, "--config")
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: the file must hold `option: value` lines.")
    yield from _once_each(_settings_of_mapping(root, path, flags))


def _yaml_of_file(path: Path, option: str) -> yaml.Node | None:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{option} {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{option} {path} is not a text file in UTF-8.") from None
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_line_of(error)} is not valid YAML.") from None


def _once_each(settings: Iterator[Setting]) -> Iterator[Setting]:
    seen: dict[str, str] = {}
    for setting in settings:
        if setting.flag.name in seen:
            raise UserError(f"{setting.where} is set twice; the other is {seen[setting.flag.name]}.")
        seen[setting.flag.name] = setting.where
        yield setting


def _settings_of_mapping(node: yaml.MappingNode, path: Path, flags: Mapping[str, Flag]) -> Iterator[Setting]:
    groups = {flag.group for flag in flags.values()} - {None}
    for key, value in node.value:
        where = f"{path}:{key.start_mark.line + 1}: {key.value}"
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{path}:{key.start_mark.line + 1}: a key must be the name of an option or of a group.")
        if key.value in groups and isinstance(value, yaml.MappingNode):
            yield from _settings_of_mapping(value, path, flags)
            continue
        flag = flags.get(key.value.replace("_", "-"))
        if flag is None or flag.group is None:
            file_flags = {name: flag for name, flag in flags.items() if flag.group is not None}
            raise unknown_option(where, key.value.replace("_", "-"), file_flags)
        # null leaves an option unset, as in a resolved config.
        if value.tag != _YAML_NULL:
            yield Setting(flag=flag, words=_yaml_words(flag, value, where), where=where)


def _yaml_words(flag: Flag, node: yaml.Node, where: str) -> tuple[str, ...]:
    """The words of an option: one, or those of a list where the option takes several."""
    listed = isinstance(node, yaml.SequenceNode) and flag.takes_several
    words: list[Any] = node.value if listed else [node]
    if not all(isinstance(word, yaml.ScalarNode) for word in words):
        raise UserError(f"{where} holds a list or a mapping; the value must be {flag.expected}.")
    return tuple(_yaml_value(flag, word, where) for word in words)


def _yaml_value(flag: Flag, node: yaml.ScalarNode, where: str) -> str:
    """The value as written; YAML's own reading of it is used for switches only (yes, on, true)."""
    text: str = node.value
    if not flag.is_switch:
        return text
    if node.tag != _YAML_BOOL:
        raise UserError(f"{where} {text}: the value must be {flag.expected}.")
    return str(yaml.SafeLoader.bool_values[text.lower()])


def _line_of(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f":{mark.line + 1}"
