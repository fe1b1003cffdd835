"""Evaluation tasks during training, on the run's own weights and layout, without a copy."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.run import RunConfig
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.errors import UserError
from hft_megatron.evaluation.answers import NotFinite
from hft_megatron.evaluation.forward import ModelInPlace
from hft_megatron.evaluation.outcomes import ReadTask, outcome_of, read_task
from hft_megatron.evaluation.task_files import read_tasks
from hft_megatron.parallel.consensus import gathered
from hft_megatron.tracking.tracker import FILE_NAME, ITERATION, of_task
from hft_megatron.trainer.garbage import collected_around_validation
from hft_megatron.trainer.loop import Hook
from hft_megatron.trainer.out_of_memory import memory_errors_with_advice
from hft_megatron.trainer.run import Run


def tasks_of_run(config: RunConfig, tokenizer: Tokenizer, shape: ModelShape) -> tuple[ReadTask, ...]:
    """The tasks of --eval-tasks with their examples; none without it. UserError for each mistake in their files."""
    file = config.logging.eval_tasks
    if file is None:
        return ()
    tasks = read_tasks(Path(file), "--eval-tasks")
    generated = [task.name for task in tasks if task.kind == "generate"]
    if generated and config.training.transformer_impl != "local":
        raise UserError(
            f"--eval-tasks {file}: {generated[0]} generates text, which needs the key-value cache of "
            f"--transformer-impl local; choose it, or evaluate the checkpoints with `hft-megatron evaluate`."
        )
    return tuple(read_task(task, tokenizer, shape.max_position_embeddings) for task in tasks)


@contextmanager
def model_of(run: Run) -> Iterator[ModelInPlace]:
    """The run's own model in place, for reading only."""
    model = ModelInPlace(chunks=run.wrapped.modules, placement=run.placement)
    with collected_around_validation(run.config.training), run.wrapped.gathered_parameters():
        for chunk in model.chunks:
            chunk.eval()
        yield model
        for chunk in model.chunks:
            chunk.train()


@dataclass
class EvaluateTasks(Hook):
    """Records the values of all tasks every ``interval`` iterations, at the end of every round and of the run, and with
    --eval-on-start before the first step; a resumed run does not repeat recorded values.

    It runs after the checkpoint of the same iteration: a resumed run records what a run that ended in between did not.
    """

    tasks: Sequence[ReadTask]
    tokenizer: Tokenizer
    interval: int | None
    on_start: bool
    batch_size: int
    _last: int | None = None
    """The newest iteration with a record; None before the first round."""

    def at_round_start(self, run: Run) -> None:
        iteration = run.state.iteration
        if self._last is None:
            self._last = iteration if iteration > 0 and self._has_record(run) else -1
            if iteration > 0:
                self.after_iteration(run)
        if self.on_start and iteration == 0:
            self._evaluate(run)

    def after_iteration(self, run: Run) -> None:
        if self.interval is not None and run.state.iteration % self.interval == 0:
            self._evaluate(run)

    def at_round_end(self, run: Run) -> None:
        # The last checkpoint comes with the end of the run.
        if not run.is_complete:
            self._evaluate(run)

    def at_end(self, run: Run) -> None:
        self._evaluate(run)

    def _has_record(self, run: Run) -> bool:
        """Return whether the save folder has this iteration's values of all tasks; collective."""
        save, iteration = run.config.checkpoint.save, run.state.iteration
        found = False
        # The rank that writes it.
        if save is not None and run.placement.is_last_rank and (Path(save) / FILE_NAME).exists():
            records = map(json.loads, (Path(save) / FILE_NAME).read_text(encoding="utf-8").splitlines())
            names = [name for record in records if record[ITERATION] == iteration for name in record]
            found = all(any(name.startswith(of_task(read.task.name, "")) for name in names) for read in self.tasks)
        return any(gathered(found))

    def _evaluate(self, run: Run) -> None:
        if self._last == run.state.iteration:
            return
        self._last = run.state.iteration
        when = f"while evaluating tasks after iteration {run.state.iteration}"
        advice = (
            f"give an --eval-tasks-batch-size below {self.batch_size}, or leave --eval-tasks out and evaluate the "
            f"checkpoints with `hft-megatron evaluate`."
        )
        with memory_errors_with_advice(run.placement, when=lambda: when, advice=lambda: advice), model_of(run) as model:
            values = self._values(run, model)
        if values:
            run.log(values)

    def _values(self, run: Run, model: ModelInPlace) -> dict[str, float]:
        values: dict[str, float] = {}
        for read in self.tasks:
            name = read.task.name
            try:
                outcome = outcome_of(read, model, self.tokenizer, batch_size=self.batch_size, say=run.announce)
            except NotFinite:
                run.announce(
                    f"> warning: iteration {run.state.iteration} has no values of the task {name}, because the model's "
                    f"logits are not finite"
                )
                continue
            values |= {of_task(name, measure): value for measure, value in outcome.values.items()}
        return values


def evaluations(tasks: Sequence[ReadTask], tokenizer: Tokenizer | None, config: RunConfig) -> list[Hook]:
    """The hook of a run that has tasks."""
    if not tasks:
        return []
    assert tokenizer is not None
    options = config.logging
    return [
        EvaluateTasks(
            tasks=tasks,
            tokenizer=tokenizer,
            interval=options.eval_tasks_interval,
            on_start=options.eval_on_start,
            batch_size=options.eval_tasks_batch_size,
        )
    ]
