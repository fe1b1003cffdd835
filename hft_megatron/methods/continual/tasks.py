"""The tasks of a sequence: the training data of each, and the evaluation task that scores it."""

from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from hft_megatron.config.continual import ContinualConfig
from hft_megatron.config.data import DataConfig
from hft_megatron.config.loading import with_mapping, yaml_of_file
from hft_megatron.config.lora import are_alike
from hft_megatron.config.optimizer import OptimizerConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.errors import UserError
from hft_megatron.evaluation.task_files import task_of_entry
from hft_megatron.evaluation.tasks import Task
from hft_megatron.evaluation.trace import GLOBAL_BATCH_SIZE, LEARNING_RATE, TRACE, find_trace

_OWN = ("name", "evaluate")


@dataclass(frozen=True, kw_only=True)
class ContinualTask:
    """One task of a sequence."""

    name: str
    config: RunConfig
    """The run's options with the task's own; without those that stages add."""
    evaluation: Task
    """Evaluation task; its first metric is the task's score."""


def read_continual_tasks(options: ContinualConfig, base: RunConfig) -> tuple[ContinualTask, ...]:
    """The tasks in the order in which they are learned; ``base`` holds the options of all of them.

    Raises UserError, with file and line where there are any, for a file that is no list of tasks or a folder that is
    not TRACE's, for an option that a task cannot have, and for an unknown name in --continual-order.
    """
    assert options.continual_tasks is not None
    path = Path(options.continual_tasks)
    tasks = _of_trace(path, base) if path.is_dir() else _of_file(path, base)
    if not options.continual_order:
        return tasks
    by_name = {task.name: task for task in tasks}
    for name in options.continual_order:
        if name not in by_name:
            raise UserError(f"--continual-order {name}: --continual-tasks {path} has {', '.join(by_name)}; use these.")
    return tuple(by_name[name] for name in options.continual_order)


def _of_trace(folder: Path, base: RunConfig) -> tuple[ContinualTask, ...]:
    """TRACE's tasks with its epochs, batch size and rate, where the command gives none."""
    training, optimizer = base.training, base.optimizer
    if training.global_batch_size == TrainingConfig.global_batch_size:
        training = replace(training, global_batch_size=GLOBAL_BATCH_SIZE)
    if optimizer.lr == OptimizerConfig.lr:
        optimizer = replace(optimizer, lr=LEARNING_RATE)
    has_length = training.train_epochs is not None or training.train_iters is not None
    tasks = []
    for task in find_trace("--continual-tasks", folder):
        length = training if has_length else replace(training, train_epochs=TRACE[task.name].epochs)
        data = replace(base.data, train_data_path=(str(folder / task.name),))
        config = replace(base, training=length, optimizer=optimizer, data=data)
        tasks.append(ContinualTask(name=task.name, config=config, evaluation=task))
    return tuple(tasks)


def _of_file(path: Path, base: RunConfig) -> tuple[ContinualTask, ...]:
    root = yaml_of_file(path, "--continual-tasks")
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        raise UserError(
            f"--continual-tasks {path}: the file must hold a list of tasks, each `- name: ...`, its options and "
            f"`evaluate`."
        )
    tasks: list[ContinualTask] = []
    for node in root.value:
        task = _entry(node, path, base)
        if any(task.name == other.name for other in tasks):
            raise UserError(f"{path}:{node.start_mark.line + 1}: there is already a task {task.name}; rename one.")
        tasks.append(task)
    return tuple(tasks)


def _entry(node: yaml.Node, path: Path, base: RunConfig) -> ContinualTask:
    line = node.start_mark.line + 1
    found: dict[str, yaml.Node] = {}
    if isinstance(node, yaml.MappingNode):
        found = {key.value: value for key, value in node.value if key.value in _OWN}
    name, evaluation = found.get("name"), found.get("evaluate")
    if not isinstance(node, yaml.MappingNode) or not isinstance(name, yaml.ScalarNode) or not name.value:
        raise UserError(f"{path}:{line}: a task must begin with `name:`, such as `- name: FOMC`.")
    if "/" in name.value:
        raise UserError(f"{path}:{line}: the task {name.value} names its folder, which cannot have a /; rename it.")
    if not isinstance(evaluation, yaml.MappingNode):
        raise UserError(f"{path}:{line}: the task {name.value} has no `evaluate`, the task that scores it; add it.")
    rest = yaml.MappingNode(node.tag, [pair for pair in node.value if pair[0].value not in _OWN], node.start_mark)
    config = with_mapping(base, rest, path)
    _check(config, base, f"{path}:{line}: the task {name.value}")
    return ContinualTask(name=name.value, config=config, evaluation=task_of_entry(evaluation, path, name.value))


def _check(config: RunConfig, base: RunConfig, task: str) -> None:
    """Checks that a task has data and a length, and neither a model nor folders of its own."""
    if config.data.train_data_path == DataConfig.train_data_path:
        raise UserError(f"{task} has no `train_data_path`; name its data.")
    if config.training.train_iters == 0:
        raise UserError(f"{task} has `train_iters: 0`, so nothing is learned; leave out the option, or the task.")
    for group in ("model", "parallel", "checkpoint"):
        if getattr(config, group) != getattr(base, group):
            raise UserError(f"{task} cannot have its own model, layout or folders; give them to the command.")
    if not are_alike(config.lora, base.lora):
        raise UserError(
            f"{task} cannot have its own adapters, only its own lora_dropout; give --lora-rank and its other options "
            f"to the command."
        )
