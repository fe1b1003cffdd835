"""The interface of every kind of task."""

from collections.abc import Sequence
from typing import Any, Protocol

from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.evaluation.examples import EvalExample, Generated, SequenceScore, TaskExamples
from hft_megatron.evaluation.tasks import Task, TaskKind

Answer = Generated | Sequence[SequenceScore]
"""The continuation of an example's prompt, or the scores of its sequences in their order."""


class Kind(Protocol):
    """Makes examples from a task's files, and records from a model's answers."""

    name: TaskKind
    default_metrics: tuple[str, ...]

    def metrics(self) -> tuple[str, ...]:
        """Names of the measures that its tasks may have."""

    def read(self, task: Task, tokenizer: Tokenizer, window: int) -> TaskExamples:
        """The examples of the task's files, for a model that reads ``window`` tokens.

        A sequence has at most one token more, which is scored and never read. Raises UserError for each error in the
        files, and counts cut and omitted rows.
        """

    def record(self, task: Task, example: EvalExample, answer: Answer) -> dict[str, Any]:
        """The record of an answer, as JSON: ``example`` is its place, and ``statistics`` has the numbers of each of the
        task's metrics, whose sums over all examples give its value."""
