"""The stages of a sequence of tasks: each task is a stage, and one or several rounds of the method."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from hft_megatron.config.continual import ContinualConfig
from hft_megatron.config.declared import flag
from hft_megatron.config.lora import for_later_stages
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import same_folder
from hft_megatron.config.stages import Stage, named_logging, without_exports
from hft_megatron.errors import UserError
from hft_megatron.methods.continual.tasks import ContinualTask

REPLAY_FILE = "replay/{}.{}.jsonl"
"""Path in --save: the records that a stage replays of an earlier task, by the names of both."""
_OF_EACH_TASK = {"train_data_path", "valid_data_path"}
"""Options that tasks keep for themselves when their data is trained together."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stage of the sequence, and its purpose."""

    stage: Stage
    after: int
    """Number of tasks that have been learned when it is done."""
    ends_task: bool = True
    """True if the task's row of the matrix follows, and not another stage of the same task."""
    replays: tuple[tuple[Path, ContinualTask], ...] = ()
    """Files for the records replayed of earlier tasks, written before the sequence begins."""


def parts_of(tasks: Sequence[ContinualTask], base: RunConfig, options: ContinualConfig) -> tuple[Part, ...]:
    """The stages in their order, without the numbers of their rounds. Raises UserError where one stage trains the data
    of several tasks whose options differ."""
    if options.continual_setting == "joint":
        _check_alike(tasks, "--continual-setting joint", [group.name for group in fields(RunConfig)])
        sources = tuple(path for task in tasks for path in task.config.data.train_data_path)
        first = tasks[0].config
        config = replace(first, data=replace(first.data, train_data_path=sources))
        return (Part(stage=_stage(config, base, "joint", None), after=len(tasks)),)
    if options.replay_ratio is not None:
        _check_alike(tasks, f"--replay-ratio {options.replay_ratio}", ["data"])
    parts: list[Part] = []
    for number, task in enumerate(tasks):
        name, earlier = f"task_{number}_{task.name}", tasks[:number]
        before = None if not parts or options.continual_setting == "single" else parts[-1].stage
        replays: tuple[tuple[Path, ContinualTask], ...] = ()
        if options.replay_ratio is not None:
            replays = tuple((_folder(base, REPLAY_FILE.format(name, other.name)), other) for other in earlier)
        again = (*(str(path) for path, _ in replays), *options.replay_data_path)
        own = task.config
        if again and options.replay_phase == "mixed":
            own = _with_data(own, (*own.data.train_data_path, *again))
        is_last_phase = not again or options.replay_phase == "mixed"
        stage = _stage(own, base, name, before)
        parts.append(Part(stage=stage, after=number + 1, ends_task=is_last_phase, replays=replays))
        if not is_last_phase:
            phase = _with_data(task.config, again)
            phase = replace(
                phase, training=replace(phase.training, train_epochs=1, train_iters=None, train_samples=None)
            )
            following = replace(_stage(phase, base, f"{name}_replay", stage), shares_rounds=True)
            parts.append(Part(stage=following, after=number + 1))
    last = len(parts) - 1
    return tuple(part if number == last else _without_exports(part) for number, part in enumerate(parts))


def _check_alike(tasks: Sequence[ContinualTask], option: str, groups: Sequence[str]) -> None:
    first = tasks[0]
    for task in tasks[1:]:
        for group in groups:
            had, has = (asdict(getattr(one.config, group)) for one in (first, task))
            for name in sorted(has.keys() - _OF_EACH_TASK):
                if had[name] != has[name]:
                    raise UserError(
                        f"{option} trains data of several tasks at once, but the task {first.name} has {name} "
                        f"{had[name]} and {task.name} has {has[name]}; give {flag(name)} for all, and no task its own."
                    )


def _without_exports(part: Part) -> Part:
    config = part.stage.config
    config = replace(config, checkpoint=without_exports(config.checkpoint))
    return replace(part, stage=replace(part.stage, config=config))


def _with_data(config: RunConfig, paths: tuple[str, ...]) -> RunConfig:
    return replace(config, data=replace(config.data, train_data_path=paths))


def _folder(base: RunConfig, name: str) -> Path:
    """A file or folder in --save."""
    assert base.checkpoint.save is not None
    return Path(base.checkpoint.save) / name


def _stage(config: RunConfig, base: RunConfig, name: str, before: Stage | None) -> Stage:
    whole, folder = base.checkpoint, str(_folder(base, name))
    own = replace(config.checkpoint, save=folder)
    if before is not None:
        own = replace(own, load=str(before.folder), finetune=True)
        config = replace(config, lora=for_later_stages(config.lora))
    elif same_folder(str(whole.save), whole.load):
        own = replace(own, load=folder)
    logging = named_logging(config.logging, base.logging, name)
    return Stage(method="sft", config=replace(config, checkpoint=own, logging=logging))
