"""Tasks put to one model: from their files to values, in the layout that the model is in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hft_megatron.data.chat import end_token_ids
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.evaluation.answers import Progress, Questions, answers_of
from hft_megatron.evaluation.examples import Answer, Generated, SequenceScore, TaskExamples
from hft_megatron.evaluation.forward import ModelInPlace
from hft_megatron.evaluation.generation import GenerationRules
from hft_megatron.evaluation.kinds import KINDS
from hft_megatron.evaluation.measures import MEASURES
from hft_megatron.evaluation.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a model did in a task."""

    records: Sequence[Mapping[str, Any]]
    """One for each example, in their order."""
    values: Mapping[str, float]
    """By the names of the task's measures."""
    counts: Mapping[str, int]
    """What was cut, left out or never ended, by its name."""


@dataclass(frozen=True, kw_only=True)
class ReadTask:
    """A task with the examples that its files have for one tokenizer and window."""

    task: Task
    read: TaskExamples
    questions: Questions

    def outcome(self, answers: Sequence[Answer]) -> Outcome:
        """Of the answers to ``questions``, in their order."""
        kind, remaining = KINDS[self.task.kind], iter(answers)
        records = []
        for example in self.read.examples:
            if example.prompt is not None:
                answer = next(remaining)
                assert isinstance(answer, Generated)
                records.append(kind.record(self.task, example, answer))
            else:
                scores = [next(remaining) for _ in example.sequences]
                assert all(isinstance(score, SequenceScore) for score in scores)
                records.append(kind.record(self.task, example, scores))  # type: ignore[arg-type]
        values = {}
        for name in self.task.metrics:
            sums = map(sum, zip(*(record["statistics"][name] for record in records), strict=True))
            values[name] = MEASURES[name].total(list(sums))
        return Outcome(records=records, values=values, counts={**self.read.counts, **_endings(records)})


def _endings(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How often generation came to no end of its own, and an answer was not found in what it gave."""
    generated = [record for record in records if "ended_by" in record]
    if not generated:
        return {}
    return {
        "without_end": sum(record["ended_by"] == "length" for record in generated),
        "without_answer": sum(not record["extracted"] for record in generated),
    }


def read_task(task: Task, tokenizer: Tokenizer, window: int) -> ReadTask:
    """Reads the files of a task. UserError for each mistake in them."""
    read = KINDS[task.kind].read(task, tokenizer, window)
    if task.kind != "generate":
        sequences = [sequence for example in read.examples for sequence in example.sequences]
        return ReadTask(task=task, read=read, questions=Questions(sequences=sequences))
    rules = GenerationRules(
        max_new_tokens=task.max_new_tokens,
        temperature=task.temperature,
        top_k=task.top_k,
        top_p=task.top_p,
        seed=task.seed,
        stop=task.stop,
        end_ids=tuple(end_token_ids(tokenizer.facts)),
    )
    prompts = [example.prompt for example in read.examples if example.prompt is not None]
    return ReadTask(task=task, read=read, questions=Questions(prompts=prompts, rules=rules))


def outcome_of(
    read: ReadTask,
    model: ModelInPlace,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    say: Callable[[str], None],
    known: Mapping[int, Sequence[Answer]] | None = None,
    keep: Callable[[int, Sequence[Answer]], None] | None = None,
) -> Outcome:
    """Puts a task to a model; the same on every rank. Collective over all ranks; see ``answers_of``."""
    answers = answers_of(
        model,
        tokenizer,
        read.questions,
        batch_size=batch_size,
        progress=Progress(name=read.task.name, total=len(read.questions), say=say),
        known=known,
        keep=keep,
    )
    return read.outcome(answers)
