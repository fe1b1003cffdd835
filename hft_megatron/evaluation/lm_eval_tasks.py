"""Finds the requested tasks of lm-evaluation-harness, and reports unsupported ones in a sentence."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FoundTasks:
    """Tasks by their names, and the index that they are in."""

    names: Sequence[str]
    manager: TaskManager


def find_tasks(tasks: Sequence[str], include_path: str | None) -> FoundTasks:
    """See ``lm_eval.find_tasks``."""
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--lm-eval-include {include_path} is not a folder; name the one with the tasks' YAML files.")
    manager = _own_tasks(tasks, include_path) or _Tasks(include_path=include_path)
    return FoundTasks(names=[name for task in tasks for name in _names(task, manager)], manager=manager)


def evaluate(model: LM, tasks: FoundTasks, *, num_fewshot: int | None, limit: int | None) -> dict[str, Any]:
    """See ``run_lm_eval``."""
    found: dict[str, Any] | None = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks.names),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=tasks.manager,
        # No task draws from torch, and this process's other draws stay as they are.
        torch_random_seed=None,
    )
    assert found is not None, "this is rank 0"
    return found


class _Tasks(TaskManager):
    """The harness's index, whose tasks are read here."""

    def load(self, task_list: Any) -> Any:
        """Raises UserError for data that cannot be reached and for tasks that this model doesn't support."""
        names = ", ".join(task_list)
        try:
            loaded = super().load(task_list)
        except OSError as error:
            raise UserError(
                f"--lm-eval-tasks: lm-evaluation-harness cannot read the data of {names} ({_one_line(error)}); "
                "fetch it where there is a network, into the cache that HF_HOME names, or write a task that reads "
                "local files."
            ) from error
        except ImportError as error:
            raise UserError(
                f"--lm-eval-tasks: lm-evaluation-harness needs another package for {names} ({_one_line(error)}); "
                "install it."
            ) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(
                    f"--lm-eval-tasks: the task {name} runs code that a model wrote, which is not supported; "
                    "leave it out."
                )
            if getattr(task, "MULTIMODAL", False):
                raise UserError(
                    f"--lm-eval-tasks: the task {name} needs more than text, which LLaMA cannot read; leave it out."
                )
        return loaded


def _own_tasks(tasks: Sequence[str], include_path: str | None) -> TaskManager | None:
    """The tasks of the folder alone, if it has all that are asked for: reading the harness's own takes seconds."""
    if include_path is None:
        return None
    manager = _Tasks(include_path=include_path, include_defaults=False)
    # A group may name the harness's tasks.
    return manager if set(tasks) <= set(manager.all_subtasks) else None


def _names(task: str, manager: TaskManager) -> list[str]:
    """The tasks that a name, a pattern or a file means."""
    found: list[str] = manager.match_tasks([task])
    if found or Path(task).is_file():
        return found or [task]
    nearest = get_close_matches(task, manager.all_tasks, n=1)
    hint = f"the nearest is {nearest[0]}" if nearest else "`lm-eval ls tasks` lists all"
    raise UserError(
        f"--lm-eval-tasks {task}: lm-evaluation-harness has no such task; {hint}, and own tasks are YAML files in the "
        f"folder of --lm-eval-include."
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
