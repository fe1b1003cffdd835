"""What every kind of task offers."""

from collections.abc import Sequence
from typing import Any, Protocol

from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.evaluation.examples import EvalExample, Generated, SequenceScore, TaskExamples
from hft_megatron.evaluation.tasks import Task, TaskKind

Answer = Generated | Sequence[SequenceScore]
"""The continuation of an example's prompt, or the scores of its sequences in their order."""


class Kind(Protocol):
    """Makes examples of a task's files, and records of what a model answers."""

    name: TaskKind
    default_metrics: tuple[str, ...]

    def metrics(self) -> tuple[str, ...]:
        """Names of the measures that a task of it may have."""

    def read(self, task: Task, tokenizer: Tokenizer, window: int) -> TaskExamples:
        """The examples of the task's files, for a model that reads ``window`` tokens.

        A sequence has at most one token more, which is scored and never read. Raises UserError for each mistake in the
        files, and counts what is cut or left out.
        """

    def record(self, task: Task, example: EvalExample, answer: Answer) -> dict[str, Any]:
        """What is kept of the answer, as JSON has it: ``example`` is its place, and ``statistics`` has the numbers of
        each of the task's metrics, whose sums over all examples make its value."""
