"""A sequence of tasks from its options to its score matrix, in one process; resumes wherever it was stopped."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hft_megatron.checkpoint.finished import discard_checkpoints, reached
from hft_megatron.checkpoint.folders import chain_of, complete_checkpoints
from hft_megatron.checkpoint.saved_run import SavedRun
from hft_megatron.config.continual import ContinualConfig
from hft_megatron.config.loading import read_resolved
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import FISHER_FOLDER, RESOLVED_CONFIG_FILE
from hft_megatron.config.run_identity import RunIdentity
from hft_megatron.config.stages import Stage, with_one_schedule
from hft_megatron.config.validation import shape_of
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import OnLoss, UserError
from hft_megatron.evaluation.matrix import Column, ScoreMatrix
from hft_megatron.evaluation.measures import DIVERGENCES
from hft_megatron.evaluation.outcomes import ReadTask, read_task
from hft_megatron.evaluation.saved_models import SavedModel
from hft_megatron.evaluation.tasks import Task
from hft_megatron.evaluation.weight_changes import UnitWeights, folder_weights, run_weights
from hft_megatron.hft.units import units_of
from hft_megatron.methods.continual.averaging import AverageWithBefore
from hft_megatron.methods.continual.replay import write_replays
from hft_megatron.methods.continual.scores import MATRIX_FILE, FillRows, Scores
from hft_megatron.methods.continual.sequence import Part, parts_of
from hft_megatron.methods.continual.tasks import ContinualTask
from hft_megatron.methods.registry import METHODS
from hft_megatron.parallel.consensus import on_rank_0
from hft_megatron.parallel.groups import stop_groups
from hft_megatron.parallel.peers import peers
from hft_megatron.trainer.convert import rounds_of_saved
from hft_megatron.trainer.inputs import tokenizer_and_shape
from hft_megatron.trainer.loop import Hook
from hft_megatron.trainer.stages import check_stages, run_what_is_left

Announce = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TaskSequence:
    """Tasks in the order of training, and the evaluations between them."""

    options: ContinualConfig
    base: RunConfig
    tasks: tuple[ContinualTask, ...]
    general: tuple[Task, ...]
    """Evaluation tasks beside the sequence."""
    parts: tuple[Part, ...]

    @property
    def folder(self) -> Path:
        """The --save folder."""
        assert self.base.checkpoint.save is not None
        return Path(self.base.checkpoint.save)

    def asked_after(self, learned: int) -> tuple[str, ...]:
        """Names of the sequence's tasks on which the model is evaluated after ``learned`` tasks."""
        names = tuple(task.name for task in self.tasks)
        is_last = learned == len(names)
        if self.options.continual_evaluate == "all" or (is_last and self.options.continual_evaluate == "last"):
            return names
        if self.options.continual_evaluate == "last":
            return ()
        if self.options.continual_setting == "single":
            return names[learned - 1 : learned]
        return names[:learned]

    def asked_before(self) -> tuple[str, ...]:
        """Names of the tasks on which the untrained model is evaluated."""
        return () if self.options.continual_evaluate == "last" else tuple(task.name for task in self.tasks)


def check_sequence(sequence: TaskSequence, world_size: int) -> list[str]:
    """Reads the data of every stage and every evaluation task, and returns lines that describe them. Raises UserError
    for the first error. Replayed records are not drawn yet."""
    parts = parts_of(sequence.tasks, sequence.base, replace(sequence.options, replay_ratio=None))
    stages = [part.stage for part in parts]
    lines, iterations = check_stages(stages, world_size, METHODS)
    _in_schedule(stages, iterations, sequence.options)
    read, _ = _read(sequence)
    return [*lines, *(f"{name}: {len(one.read.examples)} examples to evaluate" for name, one in read.items())]


def run_sequence(sequence: TaskSequence, world_size: int, *, announce: Announce, on_loss: OnLoss) -> Mapping[str, Any]:
    """Trains and evaluates what is still missing, and returns the contents of the matrix file.

    Every rank calls it under torchrun's environment. Raises what ``run_training`` does, and UserError where the matrix
    in --save is of other tasks.
    """
    minutes = sequence.base.parallel.distributed_timeout_minutes
    stages: Sequence[Stage] = [part.stage for part in sequence.parts]
    with peers(minutes, on_loss) as company:
        company.join(sequence.base.parallel)
        ratio, seed = sequence.options.replay_ratio, sequence.base.training.seed
        if ratio is not None:
            for line in on_rank_0(lambda: write_replays(sequence.parts, ratio=ratio, seed=seed)):
                announce(f"> {line}")
        _, iterations = check_stages(stages, world_size, METHODS)
        stages = _in_schedule(stages, iterations, sequence.options)
        read, tokenizer = _read(sequence)
        for line in [note for one in read.values() for note in one.read.notes]:
            announce(f"> {line}")
        matrix, notes = on_rank_0(lambda: _matrix(sequence))
        if sequence.options.continual_kl_to_base:
            notes = (*notes, *_without_divergences(matrix, sequence.general))
        for line in notes:
            announce(f"> {line}")
        base = sequence.base.model.load_hf if sequence.options.continual_kl_to_base else None
        scores = Scores(
            matrix,
            sequence.folder,
            tokenizer,
            sequence.options.continual_batch_size,
            base=None if base is None else SavedModel.read(base, "--load-hf"),
        )

        def after_saving(number: int) -> Sequence[Hook]:
            return [_rows_of(sequence, number, scores, read)]

        def when_over(number: int) -> None:
            for line in on_rank_0(lambda: _discarded(sequence, number)):
                announce(line)

        run_what_is_left(
            stages,
            shape_of(sequence.base.model),
            world_size,
            METHODS,
            company,
            hooks=lambda number: _averaging(sequence, number),
            after_saving=after_saving,
            when_over=when_over,
        )
        company.leave()
        stop_groups()
    return scores.matrix.contents()


def _in_schedule(stages: Sequence[Stage], iterations: Sequence[int], options: ContinualConfig) -> Sequence[Stage]:
    return with_one_schedule(stages, iterations) if options.continual_schedule == "continue" else stages


def trained_share(sequence: TaskSequence) -> float:
    """The share of the model's weights (0 to 1) that trained in at least one round of a completed sequence."""
    trained = set[str]()
    for part in sequence.parts:
        folder = part.stage.folder
        ended, shape = reached(folder), RunIdentity.read("--save", str(folder)).shape
        assert ended is not None, "the sequence is done"
        rounds = rounds_of_saved(folder, read_resolved(folder / RESOLVED_CONFIG_FILE), shape)
        for round in range(rounds.schedule.first_round, ended.round + 1):
            trained |= rounds.plan(round).training
    units = units_of(shape)
    return sum(unit.parameters for unit in units if unit.name in trained) / sum(unit.parameters for unit in units)


def _read(sequence: TaskSequence) -> tuple[dict[str, ReadTask], Tokenizer]:
    """All evaluation tasks by name, and the tokenizer of the run."""
    first = sequence.parts[0].stage.config
    tokenizer, shape = tokenizer_and_shape(first, shape_of(first.model))
    assert tokenizer is not None
    window = shape.max_position_embeddings
    asked = [*(task.evaluation for task in sequence.tasks), *sequence.general]
    return {task.name: read_task(task, tokenizer, window) for task in asked}, tokenizer


def _matrix(sequence: TaskSequence) -> tuple[ScoreMatrix, tuple[str, ...]]:
    """The matrix in --save, or an empty one, and notes. Raises UserError where it is of another sequence."""
    tasks = [_column(task.evaluation) for task in sequence.tasks]
    general, path = [_column(task) for task in sequence.general], sequence.folder / MATRIX_FILE
    if not path.exists():
        return ScoreMatrix(tasks, general), ()
    return ScoreMatrix.read(path).resumed(tasks, general, path)


def _without_divergences(matrix: ScoreMatrix, general: Sequence[Task]) -> list[str]:
    """A line about rows that were filled without --continual-kl-to-base: their models may have been deleted."""
    texts = [task.name for task in general if task.kind == "text"]
    rows = [
        task.name
        for after, task in enumerate(matrix.tasks, start=1)
        for name in texts
        if (cell := matrix.cell(after, name)) is not None and not set(DIVERGENCES) & cell.beside.keys()
    ]
    found = ", ".join(dict.fromkeys(rows))
    return [f"--continual-kl-to-base: the rows of {found} were filled without it, and stay as they are"] if rows else []


def _column(task: Task) -> Column:
    return Column(name=task.name, digest=task.digest, measure=task.metrics[0])


def _averaging(sequence: TaskSequence, number: int) -> list[Hook]:
    """The hook of the stage that ends a task under --continual-average, with the weights that the task started from."""
    coefficient, part = sequence.options.continual_average, sequence.parts[number]
    if coefficient is None or not part.ends_task:
        return []
    earlier = [other.stage.folder for other in sequence.parts[:number] if other.ends_task]
    folder = sequence.base.model.load_hf

    def before() -> AbstractContextManager[UnitWeights]:
        if earlier:
            return run_weights(SavedRun.read(str(earlier[-1]), None))
        assert folder is not None, "averaged with the first weights"
        return folder_weights(folder, option="--load-hf")

    return [AverageWithBefore(coefficient, before)]


def _rows_of(sequence: TaskSequence, number: int, scores: Scores, read: Mapping[str, ReadTask]) -> FillRows:
    general = [read[task.name] for task in sequence.general]
    part = sequence.parts[number]
    before = [read[name] for name in sequence.asked_before()] + general if number == 0 else []
    after = [read[name] for name in sequence.asked_after(part.after)] + general if part.ends_task else []
    return FillRows(scores=scores, base=before, after=part.after, tasks=after)


def _discarded(sequence: TaskSequence, number: int) -> list[str]:
    """Deletes for --continual-discard after a stage that ends a task. Returns lines for the log."""
    part = sequence.parts[number]
    if not (sequence.options.continual_discard and part.ends_task):
        return []
    earlier = [other for other in sequence.parts if other.after < part.after]
    older = [other.stage.folder for other in earlier if other.after < part.after - 1]
    return discard([other.stage.folder for other in earlier], older, part.stage.folder)


def discard(earlier: Sequence[Path], older: Sequence[Path], own: Path) -> list[str]:
    """Deletes the checkpoints of the tasks before one that is done. Returns lines for the log.

    ``earlier`` are the folders of their stages, in order; ``older`` those among them whose Fisher information
    (--ewc-lambda) is contained in that of the task before this one, and which is deleted, too; ``own`` is the folder of
    the stage that ended the task. A failed deletion is tried again after the next task.
    """
    try:
        # The task was saved with --save-trained-only, which may have been left out since.
        needed = {at.parent.resolve() for path in complete_checkpoints(str(own)) for at, _ in chain_of(path)}
    except UserError as error:
        return [f"> --continual-discard: nothing is deleted, because {error}"]
    lines = []
    for folder in earlier:
        if folder.resolve() in needed:
            lines.append(f"> --continual-discard: the checkpoints in {own} are based on {folder}, which is kept")
            continue
        try:
            gone = discard_checkpoints(folder)
            if folder in older and (folder / FISHER_FOLDER).exists():
                shutil.rmtree(folder / FISHER_FOLDER)
        except OSError as error:
            lines.append(f"> --continual-discard: the checkpoints in {folder} could not be deleted: {error}")
            continue
        if gone:
            lines.append(f"> --continual-discard: deleted {len(gone)} checkpoints of {folder}, a task that is done")
    return lines
