"""Options from a YAML file and the command line: the command line overrides the file, the file the defaults.

tyro parses the values; this file decides what an option is called and words what is wrong with a name.

Both become settings of one flat table and go through one parser (tyro), so that a value means the same in either.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from hft_megatron.config.flags import (
    CONSTRUCTORS,
    OFF,
    Flag,
    Item,
    Mistake,
    Reading,
    Request,
    Setting,
    check_all,
    flags_of,
    items_of_arguments,
    named,
    turns_off,
    unknown_option,
)
from hft_megatron.config.given import ANY_RUN, Given
from hft_megatron.config.megatron_rows import Row
from hft_megatron.config.model import ModelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import RESOLVED_CONFIG_FILE, write_atomically
from hft_megatron.errors import UserError

T = TypeVar("T")

CONFIG_FLAG = "config"
"""Name of the option that takes a YAML file, in every command that has it."""

_RESOLVED_HEADER = (
    "# Every option of the run with its value; `--config` with it and other output folders repeats the run.\n"
)
_TYRO_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.UseAppendAction)
"""An option that takes several words comes as one ``--name=word`` per word."""
_METHOD = "method"
_YAML_NULL = "tag:yaml.org,2002:null"
_YAML_BOOL = "tag:yaml.org,2002:bool"


def load_options(
    options_type: type[T],
    arguments: Sequence[str],
    note: Callable[[str], None] | None = None,
    others: Mapping[str, Collection[str]] = ANY_RUN.others,
) -> T:
    """Build ``options_type``, a frozen dataclass of dataclasses, from command-line words and the file they name.

    The file may set any option of a run, so that one file serves every command: what nested dataclasses of
    ``options_type`` hold is taken, other options of a run are ignored. The outermost fields (--config itself)
    belong to the command line. Raises UserError, with a line for every name or value that is not possible, or a
    sentence about the first other mistake. ``note`` is given the lines for the log: flags of Megatron-LM's without
    effect, and former names of options. ``others`` has the names of all commands' options, by command, for errors.
    """
    flags = flags_of(options_type)
    given = Given(options=flags, others=others)
    items = list(items_of_arguments(arguments, flags, given))
    files = [item.value for item in items if isinstance(item, Setting) and item.flag.name == CONFIG_FLAG]
    reading = Reading(given)
    if files:
        taken = {name: flag for name, flag in flags.items() if flag.group is not None}
        every = _items_of_file(Path(files[-1]), flags_of(RunConfig) | taken)
        reading.take(item for item in every if not isinstance(item, Setting) or item.flag.name in taken)
    # A later setting replaces an earlier one: an option repeated after a script's own arrays overrides those.
    reading.take(items)
    reading.check(note)
    return _build(options_type, list(reading.settings.values()))


def options_of(options_type: type[T], values: Mapping[str, Any], note: Callable[[str], None] | None = None) -> T:
    """Build ``options_type`` from Python values by name (``micro_batch_size``); None leaves an option unset.

    Raises UserError for names that are no options and for a value that none can have. ``note`` as in ``load_options``.
    """
    flags, reading = flags_of(options_type), Reading()
    for written, value in values.items():
        words = tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),)
        meant = _meaning(written, written, flags)
        if isinstance(meant, Mistake):
            reading.take([meant])
        elif meant.is_switch and value is not None and not isinstance(value, bool):
            reading.take([Mistake(sentence=f"{written} {value!r}: the value must be {meant.expected}.")])
        elif value is not None:
            reading.take([_item(meant, words, written, written)])
    reading.check(note)
    return _build(options_type, list(reading.settings.values()))


def write_resolved(config: RunConfig, path: Path) -> None:
    """Write every option with its value as YAML that ``--config`` reads, atomically."""
    write_atomically(path, _RESOLVED_HEADER + yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))


def read_resolved(path: Path) -> RunConfig:
    """Read what ``write_resolved`` wrote; UserError when the file is missing or its edits are not valid."""
    reading = Reading()
    reading.take(_items_of_file(path, flags_of(RunConfig)))
    reading.check()
    return _build(RunConfig, list(reading.settings.values()))


def read_others(path: Path, known: Collection[str]) -> RunConfig:
    """A run's options with those of a file that are not ``known`` (by flag); everything else in it is ignored."""
    items = _items_of_file(path, flags_of(RunConfig))
    return _build(RunConfig, [item for item in items if isinstance(item, Setting) and item.flag.name not in known])


def with_checkpoint_args(config: RunConfig) -> RunConfig:
    """The options with the model of the run in --load, under --use-checkpoint-args and without a model of their own.

    Raises UserError where no run is named.
    """
    checkpoint = config.checkpoint
    if not checkpoint.use_checkpoint_args:
        return config
    if checkpoint.load is None:
        raise UserError("--use-checkpoint-args needs --load, the folder of the run that has the model; add it.")
    file = Path(checkpoint.load) / RESOLVED_CONFIG_FILE
    if config.model != ModelConfig() or not file.exists():
        return config
    return replace(config, model=read_resolved(file).model)


def stages_of_file(
    path: Path, base: RunConfig, note: Callable[[str], None] | None = None
) -> list[tuple[str, int, RunConfig]]:
    """The method, the line and the options of every stage of a YAML list: ``base`` with what the stage sets.

    Raises UserError naming file and line for anything but a list of stages, and for every name that is no option.
    """
    stages, readings = [], []
    root = yaml_of_file(path, "--stages")
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        raise UserError(f"--stages {path}: the file must hold a list of stages, each `- method: ...` with its options.")
    for node in root.value:
        line = node.start_mark.line + 1
        keys = dict[str, yaml.Node]()
        if isinstance(node, yaml.MappingNode):
            keys = {key.value: value for key, value in node.value if key.value == _METHOD}
        if not isinstance(node, yaml.MappingNode) or not isinstance(keys.get(_METHOD), yaml.ScalarNode):
            raise UserError(f"{path}:{line}: a stage must begin with `method:`, such as `- method: sft`.")
        node.value = [(key, value) for key, value in node.value if key.value != _METHOD]
        reading = Reading()
        reading.take(_once_each(_items_of_mapping(node, path, flags_of(RunConfig))))
        readings.append(reading)
        stages.append((keys[_METHOD].value, line, list(reading.settings.values())))
    check_all(readings, note)
    return [(method, line, _with(base, settings)) for method, line, settings in stages]


def with_mapping(base: RunConfig, node: yaml.MappingNode, path: Path) -> RunConfig:
    """``base`` with the options that a mapping of the YAML file ``path`` sets.

    Raises UserError naming file and line for a value that none of them can have.
    """
    reading = Reading()
    reading.take(_once_each(_items_of_mapping(node, path, flags_of(RunConfig))))
    reading.check()
    return _with(base, list(reading.settings.values()))


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
            return tyro.cli(options_type, args=words, config=_TYRO_CONFIG, registry=CONSTRUCTORS)
        except SystemExit:
            return None


def _items_of_file(path: Path, flags: Mapping[str, Flag]) -> Iterator[Item]:
    """The settings of a YAML file: options by name, flat or under the name of their group."""
    root = yaml_of_file(path, "--config")
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: the file must hold `option: value` lines.")
    yield from _once_each(_items_of_mapping(root, path, flags))


def yaml_of_file(path: Path, option: str) -> yaml.Node | None:
    """The contents of a YAML file, with lines, by its safe loader; None where it is empty. Raises UserError for a file
    of ``option`` that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{option} {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{option} {path} is not a text file in UTF-8.") from None
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        problem = " ".join(str(getattr(error, "problem", None) or "").split())
        raise UserError(f"{path}{_line_of(error)} is not valid YAML{f': {problem}' if problem else ''}.") from None


def _once_each(items: Iterator[Item]) -> Iterator[Item]:
    seen: dict[str, str] = {}
    for item in items:
        if not isinstance(item, Mistake):
            name = item.flag.name if isinstance(item, Setting) else item.row.name
            if name in seen:
                raise UserError(f"{item.where} is set twice, first at {seen[name]}; leave one of them out.")
            seen[name] = item.where
        yield item


def _items_of_mapping(node: yaml.MappingNode, path: Path, flags: Mapping[str, Flag]) -> Iterator[Item]:
    groups = {flag.group for flag in flags.values()} - {None}
    of_files = {name: flag for name, flag in flags.items() if flag.group is not None}
    for key, value in node.value:
        where = f"{path}:{key.start_mark.line + 1}: {key.value}"
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{path}:{key.start_mark.line + 1}: a key must be the name of an option or of a group.")
        if key.value in groups and isinstance(value, yaml.MappingNode):
            yield from _items_of_mapping(value, path, flags)
            continue
        meant = _meaning(where, key.value, of_files)
        if isinstance(meant, Mistake):
            yield meant
        # null leaves an option unset, as in a resolved config.
        elif value.tag != _YAML_NULL:
            yield _item(meant, _yaml_words(meant, value, where), where, key.value)


def _meaning(where: str, written: str, flags: Mapping[str, Flag]) -> Flag | Row | Mistake:
    """The option or row of a name in a file or a call, where a switch has a value and no ``no-``."""
    name = written.replace("_", "-")
    meant = named(name, flags)
    if meant is None or (isinstance(meant, Flag) and name == f"no-{meant.name}"):
        return unknown_option(where, name, flags)
    return meant


def _item(meant: Flag | Row, words: tuple[str, ...], where: str, written: str) -> Item:
    if isinstance(meant, Flag):
        if meant.is_switch and turns_off(written.replace("_", "-"), meant):
            words = ("False" if words == ("True",) else "True",)
        return Setting(flag=meant, words=words, where=where)
    if meant.is_switch:
        words = () if words == ("True",) else (OFF,)
    return Request(row=meant, words=words, where=where)


def _yaml_words(meant: Flag | Row, node: yaml.Node, where: str) -> tuple[str, ...]:
    """The values of an option as words: one, or those of a list where the option takes several."""
    if isinstance(meant, Row) and not meant.can_agree and not meant.is_switch:
        # An error in any case, so that every kind of value is taken.
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return tuple(part.value for part in parts if isinstance(part, yaml.ScalarNode))
    listed = isinstance(node, yaml.SequenceNode) and meant.takes_several
    words: list[Any] = node.value if listed else [node]
    if not all(isinstance(word, yaml.ScalarNode) for word in words):
        raise UserError(f"{where} holds a list or a mapping; the value must be {meant.expected}.")
    return tuple(_yaml_value(meant, word, where) for word in words)


def _yaml_value(meant: Flag | Row, node: yaml.ScalarNode, where: str) -> str:
    """The value as written; YAML's own reading of it is used for switches only (yes, on, true)."""
    text: str = node.value
    if not meant.is_switch:
        return text
    if node.tag != _YAML_BOOL:
        raise UserError(f"{where} {text}: the value must be {meant.expected}.")
    return str(yaml.SafeLoader.bool_values[text.lower()])


def _line_of(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f":{mark.line + 1}"
