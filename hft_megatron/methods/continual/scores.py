"""The score matrix as it is filled: a stage's model is evaluated when its last checkpoint is on the disk."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hft_megatron.config.run_folder import write_atomically
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import RunFailed
from hft_megatron.evaluation.forward import ModelInPlace, free_memory
from hft_megatron.evaluation.matrix import ScoreMatrix, cell_of
from hft_megatron.evaluation.outcomes import Outcome, ReadTask, outcome_of
from hft_megatron.evaluation.saved_models import SavedModel
from hft_megatron.parallel.consensus import on_rank_0
from hft_megatron.tracking.tracker import of_task
from hft_megatron.trainer.loop import Hook
from hft_megatron.trainer.run import Run
from hft_megatron.trainer.task_evaluation import model_of

MATRIX_FILE = "matrix.json"
PREDICTIONS = "predictions"
"""Folder in --save: the answers to every example, a file for each cell of the matrix."""
BASE_ROW = "base"
"""The folder of the untrained model in it."""


class Scores:
    """The matrix of a sequence in its folder, the same on every rank; rank 0 writes it after every cell."""

    def __init__(
        self, matrix: ScoreMatrix, folder: Path, tokenizer: Tokenizer, batch_size: int, base: SavedModel | None = None
    ) -> None:
        """Texts are also compared with ``base``, where there is one."""
        self.matrix = matrix
        self._folder = folder
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._base = base

    def fill(self, run: Run, after: int, tasks: Sequence[ReadTask]) -> None:
        """Evaluates the run's model, after ``after`` tasks of the sequence, on the tasks whose cells are still empty.
        Collective. Raises RunFailed where a cell cannot be written."""
        asked = [read for read in tasks if self.matrix.cell(after, read.task.name) is None]
        if not asked:
            return
        row = self._row(after)
        tasks_in_words = "1 task" if len(asked) == 1 else f"{len(asked)} tasks"
        run.announce(f"> evaluating {tasks_in_words} {'before the first task' if after == 0 else f'after {row}'}")
        compares = self._base is not None and after > 0 and any(read.task.kind == "text" for read in asked)
        with model_of(run) as model:
            self._ask(run, after, asked, model, compares=compares)
        if compares:
            free_memory(run.placement.device)

    def _ask(self, run: Run, after: int, asked: Sequence[ReadTask], model: ModelInPlace, *, compares: bool) -> None:
        """Evaluates one model. A second model is in memory until it returns, where texts are compared with one."""
        base = None
        if compares:
            assert self._base is not None
            bf16 = run.config.training.bf16 is True
            base = self._base.open(run.config.parallel, run.placement, bf16=bf16, like=run.config)
        for read in asked:
            outcome = outcome_of(read, model, self._tokenizer, batch_size=self._batch_size, say=run.announce, base=base)
            self._keep(run, after, read, outcome)

    def _row(self, after: int) -> str:
        return self.matrix.tasks[after - 1].name if after else BASE_ROW

    def _keep(self, run: Run, after: int, read: ReadTask, outcome: Outcome) -> None:
        name, metric = read.task.name, read.task.metrics[0]
        self.matrix.put(after, name, cell_of(outcome.values, metric, len(outcome.records), outcome.counts))
        run.log({of_task(name, measure): value for measure, value in outcome.values.items()})

        def write() -> None:
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in outcome.records)
            predictions = self._folder / PREDICTIONS / f"{after}_{self._row(after)}" / f"{name}.jsonl"
            try:
                predictions.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(predictions, lines)
                self.matrix.write(self._folder / MATRIX_FILE)
            except OSError as error:
                raise RunFailed(
                    f"the scores in {self._folder} cannot be written: {error}; free some space, and run the command "
                    f"again."
                ) from error

        on_rank_0(write)


@dataclass
class FillRows(Hook):
    """Fills the row of the task that a stage ends, and that of the untrained model before the first stage."""

    scores: Scores
    base: Sequence[ReadTask]
    """Tasks for the untrained model; empty in all but the first stage."""
    after: int
    """Number of tasks that have been learned when the stage is done."""
    tasks: Sequence[ReadTask]
    """Tasks to evaluate then; none where another stage of the same task follows."""

    def at_round_start(self, run: Run) -> None:
        if run.state.iteration == 0 and self.base:
            self.scores.fill(run, 0, self.base)
            self.base = ()

    def at_end(self, run: Run) -> None:
        self.scores.fill(run, self.after, self.tasks)
