"""Tasks evaluated on one model: from their files to values, in the model's layout."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hft_megatron.data.chat import end_token_ids
from hft_megatron.data.tokenizer import Tokenizer
from hft_megatron.evaluation.answers import Ask, Progress, Questions, answers_of
from hft_megatron.evaluation.examples import Answer, EvalExample, Generated, SequenceScore, TaskExamples, TextDifference
from hft_megatron.evaluation.forgetting import compare, statistics
from hft_megatron.evaluation.forward import ModelInPlace
from hft_megatron.evaluation.generation import GenerationRules
from hft_megatron.evaluation.kinds import KINDS
from hft_megatron.evaluation.measures import MEASURES
from hft_megatron.evaluation.tasks import Task

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A model's results in a task."""

    records: Sequence[Record]
    """One record for each example, in their order."""
    values: Mapping[str, float]
    """Values by the names of measures."""
    counts: Mapping[str, int]
    """Numbers of prompts and answers that were cut, left out or never ended, by name."""


@dataclass(frozen=True, kw_only=True)
class ReadTask:
    """A task with the examples of its files for one tokenizer and window."""

    task: Task
    read: TaskExamples
    rules: GenerationRules
    """Generation rules for prompts."""

    @cached_property
    def questions(self) -> Questions:
        """All questions, example by example: prompts to continue, or sequences."""
        if self.task.kind == "generate":
            prompts = [example.prompt for example in self.read.examples if example.prompt is not None]
            return Questions(prompts=prompts, rules=self.rules)
        return Questions(sequences=[sequence for example in self.read.examples for sequence in example.sequences])

    def digest(self) -> str:
        """sha256 (hex) of all questions: the ids, which of them are scored, and the rules of generation."""
        found, questions = hashlib.sha256(repr(self.rules).encode()), self.questions
        for array in [*questions.prompts, *(array for sequence in questions.sequences for array in sequence)]:
            found.update(len(array).to_bytes(8, "big") + array.tobytes())
        return found.hexdigest()

    def ask(self, model: ModelInPlace, tokenizer: Tokenizer, base: ModelInPlace | None) -> Ask:
        """The function that asks questions: texts go to the model and, if there is one, its base."""
        questions = self.questions
        if self.task.kind == "text" and base is not None:
            return lambda batch: compare(base, model, [questions.sequences[number] for number in batch])
        return lambda batch: questions.put(model, tokenizer, batch)

    def outcome(self, answers: Sequence[Answer]) -> Outcome:
        """The outcome of the answers to all questions, in their order."""
        remaining = iter(answers)
        records = [self._record(example, remaining) for example in self.read.examples]
        values = {}
        for name in records[0]["statistics"]:
            sums = map(sum, zip(*(record["statistics"][name] for record in records), strict=True))
            values[name] = MEASURES[name].total(list(sums))
        return Outcome(records=records, values=values, counts={**self.read.counts, **_endings(records)})

    def _record(self, example: EvalExample, remaining: Iterator[Answer]) -> Record:
        kind = KINDS[self.task.kind]
        if example.prompt is not None:
            answer = next(remaining)
            assert isinstance(answer, Generated)
            return kind.record(self.task, example, answer)
        answers = [next(remaining) for _ in example.sequences]
        differences = [answer for answer in answers if isinstance(answer, TextDifference)]
        scores = [answer for answer in answers if isinstance(answer, SequenceScore)]
        # A text's record keeps of a score its sums.
        scores += [SequenceScore(log_prob=-one.tuned_nats, tokens=one.tokens, is_greedy=False) for one in differences]
        record = kind.record(self.task, example, scores)
        if differences:
            beside = {name: list(numbers) for name, numbers in statistics(differences).items()}
            record["statistics"] = {**record["statistics"], **beside}
        return record


def _endings(records: Sequence[Record]) -> dict[str, int]:
    """Numbers of generations without an end of their own, and of those without an extracted answer."""
    generated = [record for record in records if "ended_by" in record]
    if not generated:
        return {}
    return {
        "without_end": sum(record["ended_by"] == "length" for record in generated),
        "without_answer": sum(not record["extracted"] for record in generated),
    }


def read_task(task: Task, tokenizer: Tokenizer, window: int) -> ReadTask:
    """Reads the files of a task. Raises UserError for each error in them."""
    rules = GenerationRules(
        max_new_tokens=task.max_new_tokens,
        temperature=task.temperature,
        top_k=task.top_k,
        top_p=task.top_p,
        seed=task.seed,
        stop=task.stop,
        end_ids=tuple(end_token_ids(tokenizer.facts)),
    )
    return ReadTask(task=task, read=KINDS[task.kind].read(task, tokenizer, window), rules=rules)


def outcome_of(
    read: ReadTask,
    model: ModelInPlace,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    say: Callable[[str], None],
    base: ModelInPlace | None = None,
    known: Mapping[int, Sequence[Answer]] | None = None,
    keep: Callable[[int, Sequence[Answer]], None] | None = None,
) -> Outcome:
    """Evaluates a task on a model; the same on every rank. Collective over all ranks; see ``answers_of``.

    With a ``base`` texts are also compared with it.
    """
    answers = answers_of(
        read.questions.lengths,
        read.ask(model, tokenizer, base),
        model.placement,
        batch_size=batch_size,
        progress=Progress(name=read.task.name, say=say),
        known=known,
        keep=keep,
    )
    return read.outcome(answers)
