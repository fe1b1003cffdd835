"""Tasks from a YAML file; errors name the line."""

import difflib
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from hft_megatron.config.data import data_keys, ignored_keys
from hft_megatron.config.declared import declared
from hft_megatron.config.loading import yaml_of_file
from hft_megatron.errors import UserError
from hft_megatron.evaluation.columns import compile_columns, is_template
from hft_megatron.evaluation.extraction import extractor
from hft_megatron.evaluation.kinds import KINDS
from hft_megatron.evaluation.tasks import FIELDS_OF, LOCATION, NEEDED_BY, Task, TaskKind

_DECLARED = {name: option for name, option in declared(Task).items() if name not in LOCATION}
_DEFAULTS = {field.name: field.default for field in fields(Task)}
_MERGE = "tag:yaml.org,2002:merge"


def read_tasks(path: Path, option: str = "--tasks") -> tuple[Task, ...]:
    """The tasks of a YAML file that ``option`` names: a list of mappings, whose keys are the fields of ``Task``.

    A key with null counts as left out. Raises UserError, one sentence with the file and the line, for everything that
    is not a task; data files are only checked for existence.
    """
    root = yaml_of_file(path, option)
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        raise UserError(f"{option} {path}: the file must hold a list of tasks, each `- name: ...` and its settings.")
    tasks: list[Task] = []
    for node in root.value:
        task = _Entry(node, path).task()
        for other in tasks:
            if other.name == task.name:
                raise UserError(
                    f"{task.place}: the task {task.name} has the name of the one at {other.place}; rename one of them."
                )
        tasks.append(task)
    return tuple(tasks)


def task_of_entry(node: yaml.MappingNode, path: Path, name: str) -> Task:
    """A task whose settings, except the name, are a mapping in another YAML file; raises like ``read_tasks``."""
    for key, _ in node.value:
        if key.value == "name":
            raise UserError(f"{path}:{key.start_mark.line + 1}: `name` is given by the entry around it; remove it.")
    tag = "tag:yaml.org,2002:str"
    marks = node.start_mark, node.start_mark
    named = (yaml.ScalarNode(tag, "name", *marks), yaml.ScalarNode(tag, name, *marks))
    return _Entry(yaml.MappingNode(node.tag, [named, *node.value], node.start_mark), path).task()


class _Entry:
    """One entry of the list: its values, and the lines of its keys."""

    def __init__(self, node: yaml.Node, path: Path) -> None:
        self._path = path
        self._line = node.start_mark.line + 1
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{self._place()}: a task must be settings such as `name: gsm8k`, one a line.")
        self._lines: dict[str, int] = {}
        self._values: dict[str, Any] = {}
        self._read(node)

    def task(self) -> Task:
        for name in ("name", "kind", "files"):
            if name not in self._values:
                raise UserError(f"{self._place()}: the task has no `{name}`; add it.")
        values = {name: self._checked(name, value) for name, value in self._values.items()}
        task = Task(**values, place=self._place(), folder=self._path.parent)
        self._check_fields(task)
        self._check_metrics(task)
        self._check_texts(task)
        task.paths()
        if task.fewshot:
            task.fewshot_paths()
        self._check_together(task)
        return task if task.metrics else replace(task, metrics=KINDS[task.kind].default_metrics)

    def _place(self, name: str | None = None) -> str:
        return f"{self._path}:{self._line if name is None else self._lines[name]}"

    def _read(self, node: yaml.MappingNode) -> None:
        constructor = yaml.constructor.SafeConstructor()
        own = [key for key, _ in node.value if key.tag != _MERGE]
        for number, key in enumerate(own):
            if key.value in [other.value for other in own[:number]]:
                raise UserError(f"{self._path}:{key.start_mark.line + 1}: `{key.value}` is set twice; remove one.")
        try:
            constructor.flatten_mapping(node)  # `<<: *other` takes another task's settings, before its own
            for key, value in node.value:
                line = key.start_mark.line + 1
                name = str(key.value) if isinstance(key, yaml.ScalarNode) else ""
                if name not in _DECLARED:
                    nearest = difflib.get_close_matches(name, _DECLARED, n=1) or list(_DECLARED)
                    hint = "the nearest is" if len(nearest) == 1 else "there are"
                    raise UserError(
                        f"{self._path}:{line}: `{name}` is not a setting of a task; {hint} {', '.join(nearest)}."
                    )
                self._lines[name] = line
                self._values[name] = constructor.construct_object(value, deep=True)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = self._line if mark is None else mark.line + 1
            raise UserError(f"{self._path}:{line} is not valid YAML: plain texts, numbers and lists alone.") from error
        self._values = {name: value for name, value in self._values.items() if value is not None}

    def _checked(self, name: str, value: Any) -> Any:
        option = _DECLARED[name]
        if get_origin(option.type) is tuple:
            words = value if isinstance(value, list) else [value]
            if words and all(isinstance(word, str) and word for word in words):
                return tuple(words)
            expected = "a text or a list of texts, none of them empty"
        else:
            if option.allows(value) and (value != "" or _DEFAULTS[name] not in (MISSING, None)):
                return float(value) if option.type is float else value
            expected = option.expected
        raise UserError(f"{self._place(name)}: {name} {_shown(value)}: the value must be {expected}.")

    def _check_fields(self, task: Task) -> None:
        for name in self._values:
            if name not in FIELDS_OF[task.kind]:
                kinds = " and ".join(kind for kind, names in FIELDS_OF.items() if name in names)
                raise UserError(
                    f"{self._place(name)}: `{name}` is of the kind {kinds}, but the task {task.name} is of the kind "
                    f"{task.kind}; remove it."
                )
        for name in NEEDED_BY[task.kind]:
            if not getattr(task, name):
                raise UserError(f"{task.place}: the task {task.name} has no `{name}`, which {task.kind} needs; add it.")

    def _check_metrics(self, task: Task) -> None:
        measured = KINDS[task.kind].metrics()
        for metric in task.metrics:
            if metric in measured:
                continue
            of_others = [kind for kind in get_args(TaskKind) if metric in KINDS[kind].metrics()]
            if of_others:
                reason = f"is of the kind {of_others[0]}; {task.kind} has {', '.join(measured)}"
            else:
                reason = f"is not known; {nearest_of(metric, measured)}"
            raise UserError(f"{self._place('metrics')}: the metric {metric} {reason}.")
        if len(set(task.metrics)) < len(task.metrics):
            raise UserError(f"{self._place('metrics')}: a metric is given twice; remove one.")

    def _check_texts(self, task: Task) -> None:
        for name in ("prompt", "target", "answer", "text", "choices"):
            written = self._values.get(name, [])
            for text in written if isinstance(written, list) else [written]:
                try:
                    if is_template(text):
                        compile_columns(text)
                except ValueError as error:
                    raise UserError(f"{self._place(name)}: the template of `{name}` {error}.") from error
        for name in ("extract", "extract_target", "data_keys", "ignore_keys"):
            if name not in self._values:
                continue
            try:
                _READERS.get(name, extractor)(self._values[name])
            except UserError as error:
                raise UserError(f"{self._place(name)}: {error}") from error

    def _check_together(self, task: Task) -> None:
        """Raise UserError for a setting that has no effect, or is not supported, beside the others."""
        needs = [("system", task.chat, "chat: true")]
        for name in ("fewshot_files", "fewshot_split", "fewshot_seed"):
            needs.append((name, task.fewshot > 0, "fewshot"))
        needs += [("fewshot_separator", task.fewshot > 0 or task.description is not None, "fewshot or description")]
        needs += [(name, task.temperature > 0, "temperature above 0") for name in ("top_k", "top_p", "seed")]
        needs += [("split", self._names_folder(task.files), "the folder of a TRACE task in files")]
        needs += [("fewshot_split", self._names_folder(task.fewshot_files or task.files), "the folder of a TRACE task")]
        for name, is_met, needed in needs:
            if name in self._values and not is_met:
                raise UserError(f"{self._place(name)}: `{name}` has no effect without {needed}; add it or remove it.")
        if task.window is not None and task.stride is not None and task.stride > task.window:
            raise UserError(
                f"{self._place('stride')}: stride {task.stride} is more than window {task.window}, so that tokens "
                f"between two windows would not be scored; make it at most {task.window}."
            )

    def _names_folder(self, files: Sequence[str]) -> bool:
        return any((self._path.parent / file).is_dir() for file in files)


_READERS = {"data_keys": data_keys, "ignore_keys": ignored_keys}


def nearest_of(name: str, names: Sequence[str]) -> str:
    """The nearest of the names, or all of them, as a clause."""
    nearest = difflib.get_close_matches(name, names, n=1)
    return f"the nearest is {nearest[0]}" if nearest else f"there are {', '.join(names)}"


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
