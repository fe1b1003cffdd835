"""The stages of a run, one after the other: each has a method, data and a length of its own, and is a round of the
method's (or several). A stage starts from the weights that the one before left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hft_megatron.config.checkpoint import CheckpointConfig
from hft_megatron.config.declared import flag
from hft_megatron.config.loading import stages_of_file
from hft_megatron.config.lora import are_alike, for_later_stages
from hft_megatron.config.names import MethodName, known
from hft_megatron.config.optimizer import warmup_fits
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import same_folder
from hft_megatron.config.tracking import LoggingConfig
from hft_megatron.errors import UserError

_OF_EXPORTS: dict[str, Any] = {
    "save_hf": None,
    "save_lora": None,
    "save_hf_interval": None,
    "save_hf_keep": None,
    "save_hf_best": None,
    "save_dtype": None,
    "keep_source_tokenizer": False,
}
"""Options that, given for all stages, apply to the last one, and their values in the others. A stage may set its
own."""
_OF_THE_WHOLE = ("save", "load", "finetune")
"""Options that a stage cannot set: stages follow one another in folders below --save."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a run, with all of its options but the number of its first round."""

    method: MethodName
    config: RunConfig
    shares_rounds: bool = False
    """True if its rounds have the numbers of the previous stage's rounds, and so their plans."""

    @property
    def folder(self) -> Path:
        """Folder of its checkpoints."""
        assert self.config.checkpoint.save is not None
        return Path(self.config.checkpoint.save)


def read_stages(path: str, base: RunConfig, note: Callable[[str], None] | None = None) -> tuple[Stage, ...]:
    """The stages that a YAML file describes; ``base`` are the options of all of them.

    Raises UserError for a file that cannot be read, an unknown method, an option that a stage cannot set, and without
    --save, which stages need to pass on their weights.
    """
    whole = base.checkpoint
    if whole.save is None:
        raise UserError(f"--stages {path} needs --save, through which stages pass on their weights; add it.")
    if base.hft.hft_first_round is not None:
        raise UserError(
            f"--hft-first-round {base.hft.hft_first_round}: --stages numbers the rounds itself; leave it out."
        )
    stages: list[Stage] = []
    read = stages_of_file(Path(path), base, note)
    for number, (method, line, config) in enumerate(read):
        if method not in known(MethodName):
            raise UserError(f"{path}:{line}: the method {method} is not one of {', '.join(known(MethodName))}.")
        exports_itself = config.checkpoint.save_hf != whole.save_hf
        for name in _OF_THE_WHOLE if exports_itself else (*_OF_THE_WHOLE, *_OF_EXPORTS):
            if getattr(config.checkpoint, name) != getattr(whole, name):
                with_folder = ", or also give the stage a save_hf" if name in _OF_EXPORTS else ""
                raise UserError(
                    f"{path}:{line}: {name} cannot be set for one stage; give {flag(name)} for all{with_folder}."
                )
        if config.model != base.model:
            raise UserError(
                f"{path}:{line}: a stage cannot have a model of its own, as all stages train one model; leave it out."
            )
        if not are_alike(config.lora, base.lora):
            raise UserError(
                f"{path}:{line}: a stage cannot have its own adapters, only its own lora_dropout; give --lora-rank and "
                f"its other options for all stages, or train the stages as separate runs."
            )
        if config.training.train_iters == 0:
            raise UserError(
                f"{path}:{line}: a stage with --train-iters 0 leaves no weights for the next; leave it out."
            )
        name = f"stage_{number}_{method}"
        folder = f"{whole.save}/{name}"
        own = replace(config.checkpoint, save=folder)
        if number < len(read) - 1 and not exports_itself:
            own = without_exports(own)
        if number < len(read) - 1 and own.save_lora == whole.save_lora:
            own = replace(own, save_lora=None)
        _check_exports(own, stages, f"{path}:{line}")
        if number > 0:
            own = replace(own, load=str(stages[-1].folder), finetune=True)
            config = replace(config, lora=for_later_stages(config.lora))
        elif same_folder(whole.save, whole.load):
            own = replace(own, load=folder)
        logging = named_logging(config.logging, base.logging, name)
        stages.append(Stage(method=method, config=replace(config, checkpoint=own, logging=logging)))
    return tuple(stages)


def _check_exports(checkpoint: CheckpointConfig, earlier: Sequence[Stage], where: str) -> None:
    """UserError where a stage exports to the folder of another export."""
    for name in ("save_hf", "save_lora"):
        folder = getattr(checkpoint, name)
        others = [one.config.checkpoint for one in earlier if folder is not None]
        if any(same_folder(folder, path) for other in others for path in (other.save_hf, other.save_lora)):
            raise UserError(f"{where}: {name} {folder} is the export folder of an earlier stage; choose another.")


def without_exports(checkpoint: CheckpointConfig) -> CheckpointConfig:
    """The options of a stage that exports nothing, because another one does."""
    return replace(checkpoint, **_OF_EXPORTS)


def named_logging(logging: LoggingConfig, of_all: LoggingConfig, stage: str) -> LoggingConfig:
    """The options with a name per stage for its curves, where all stages share one: each counts iterations from 1."""
    folder, run = logging.tensorboard_dir, logging.wandb_exp_name
    if folder is not None and folder == of_all.tensorboard_dir:
        folder = f"{folder}/{stage}"
    if run is not None and run == of_all.wandb_exp_name:
        run = f"{run}-{stage}"
    return replace(logging, tensorboard_dir=folder, wandb_exp_name=run)


def numbered(stage: Stage, first_round: int) -> Stage:
    """The stage with the number of its first round."""
    return replace(stage, config=replace(stage.config, hft=replace(stage.config.hft, hft_first_round=first_round)))


def with_one_schedule(stages: Sequence[Stage], iterations: Sequence[int]) -> tuple[Stage, ...]:
    """The stages as parts of one schedule over all their iterations. Raises UserError for a warm-up as long as all of
    them, and where their number isn't given or depends on the layout."""
    start, parts = 0, []
    for stage, length in zip(stages, iterations, strict=True):
        training = stage.config.training
        if training.train_samples is not None:
            raise UserError(
                f"--train-samples {training.train_samples} makes a schedule of samples, but one schedule over all "
                f"tasks counts iterations; give --train-iters or --train-epochs."
            )
        if training.global_batch_size is None:
            raise UserError(
                "--global-batch-size is missing: one schedule over all tasks needs their iterations, which would "
                "otherwise depend on the layout; add it."
            )
        optimizer = replace(stage.config.optimizer, lr_schedule_start=start, lr_schedule_iters=sum(iterations))
        warmup_fits(optimizer, length)
        parts.append(replace(stage, config=replace(stage.config, optimizer=optimizer)))
        start += length
    return tuple(parts)


def with_rounds_in_turn(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages numbered as if each had one round, which is enough to check them."""
    return tuple(numbered(stage, number) for number, stage in enumerate(stages))
