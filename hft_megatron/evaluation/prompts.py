"""Prompts of rows with their few-shot examples, as the pieces that training would make of them."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hft_megatron.data.chat import ChatError, ChatTemplate, LossRule
from hft_megatron.data.examples import completion_pieces
from hft_megatron.data.files.rows import Row
from hft_megatron.data.formats.completions import Completion
from hft_megatron.data.record_errors import RecordErrors, RecordRefused
from hft_megatron.data.tokenizer import Encoded, Piece, Tokenizer
from hft_megatron.errors import UserError
from hft_megatron.evaluation.columns import text_of
from hft_megatron.evaluation.task_rows import TaskRow, read_fewshot_rows
from hft_megatron.evaluation.tasks import Task

_ANSWER = LossRule(train_on_eos=False)
"""Scored part of an answer: its text, without the token that would end it."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """The question of a row."""

    row: TaskRow
    prompt: str
    """Prompt of the row alone."""
    text: str
    """Prompt after the description and the few-shot examples."""


class Prompts:
    """Makes the questions of a task, and the pieces of questions and answers."""

    def __init__(self, task: Task, tokenizer: Tokenizer, answer_of: Callable[[Row], str]) -> None:
        """``answer_of`` gives the answer of a few-shot example."""
        self._task = task
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer.facts, _ANSWER) if task.chat else None
        self._answer_of = answer_of
        self._pool = read_fewshot_rows(task)
        self._keys = [_key(row) for row in self._pool]
        self._repeats = Counter(self._keys)
        self._solved: dict[int, str] = {}

    def question(self, row: TaskRow, number: int) -> Question:
        """The question of the row that is the ``number``-th of the task. Raises UserError naming the row's place."""
        prompt = self._prompt_of(row.row)
        description = [] if self._task.description is None else [self._task.description]
        text = self._task.fewshot_separator.join([*description, *self._examples(row.row, number), prompt])
        return Question(row=row, prompt=prompt, text=text)

    def prompt_pieces(self, question: Question) -> list[Piece]:
        """All pieces before the generated text."""
        if self._template is None:
            return self._completion(question, "")
        try:
            return self._template.prompt_pieces(self._messages(question))
        except ChatError as error:
            raise UserError(f"{question.row.row.place}: {error}.") from error

    def answered_pieces(self, question: Question, answer: str) -> list[Piece]:
        """The question with an answer, which alone is scored (``Piece.trained``)."""
        whole = self._task.target_delimiter + answer
        if self._template is None:
            return self._completion(question, whole)
        messages = self._messages(question)
        try:
            pieces = self._template.pieces([*messages, {"role": "assistant", "content": whole}], given=len(messages))
        except ChatError as error:
            raise UserError(f"{question.row.row.place}: {error}.") from error
        last = max(number for number, piece in enumerate(pieces) if piece.trained)
        return pieces[: last + 1]

    def _completion(self, question: Question, answer: str) -> list[Piece]:
        record = Completion(place=question.row.row.place, prompt=question.text, completion=answer)
        return completion_pieces(record, self._tokenizer, _ANSWER)[:-1]  # without the end token

    def _messages(self, question: Question) -> list[dict[str, Any]]:
        system = [] if self._task.system is None else [{"role": "system", "content": self._task.system}]
        return [*system, {"role": "user", "content": question.text}]

    def _prompt_of(self, row: Row) -> str:
        assert self._task.prompt is not None
        return text_of(self._task.prompt, "prompt", row)

    def _examples(self, row: Row, number: int) -> list[str]:
        wanted = self._task.fewshot
        if not wanted:
            return []
        own = _key(row)
        most = wanted + self._repeats[own]
        order: Sequence[int] = range(len(self._pool))
        if self._task.fewshot_seed is not None:
            # Each question draws by its number, so that `limit` changes none of them.
            draw = random.Random(f"{self._task.fewshot_seed}:{number}")
            order = draw.sample(order, min(most, len(order)))
        chosen = [index for index in order[:most] if self._keys[index] != own][:wanted]
        if len(chosen) < wanted:
            raise UserError(
                f"{self._task.place}: fewshot is {wanted}, but the files of the few-shot examples have "
                f"{len(chosen)} rows besides the one in question, {row.place}; lower it, or name more files."
            )
        return [self._example(index) for index in chosen]

    def _example(self, index: int) -> str:
        if index not in self._solved:
            row = self._pool[index]
            self._solved[index] = self._prompt_of(row) + self._task.target_delimiter + self._answer_of(row)
        return self._solved[index]


def _key(row: Row) -> str:
    return json.dumps(row.value, sort_keys=True, default=str)


@dataclass(kw_only=True)
class Cuts:
    """Makes prompts fit, and counts the tokens cut off."""

    task: Task
    begin: int | None
    """The token that stays at the beginning."""
    errors: RecordErrors = field(default_factory=RecordErrors)
    prompts: int = 0
    tokens: int = 0

    def surplus(self, place: str, size: int, prompt: int, most: int, what: str) -> int:
        """Number of tokens by which a prompt of ``prompt`` tokens must be cut where ``size`` exceeds ``most``.

        ``what`` names both in the error about a prompt that may not be cut, which is kept until ``check``.
        """
        surplus = size - most
        if surplus <= 0:
            return 0
        if not self.task.cut_long_prompts:
            advice = "set cut_long_prompts: true to cut the beginnings of prompts, or leave the example out."
            self.errors.add(place, RecordRefused(place, f"{what}; {advice}", size))
            return 0
        if surplus >= prompt - (self.begin is not None):
            sentence = f"{what}, and nothing would be left of the prompt; leave the example out."
            self.errors.add(place, RecordRefused(place, sentence, size))
            return 0
        self.prompts += 1
        self.tokens += surplus
        return surplus

    def cut(self, ids: NDArray[Any], surplus: int) -> NDArray[Any]:
        """``ids`` without the first ``surplus`` entries after the begin token."""
        kept = 0 if self.begin is None else 1
        return ids if not surplus else np.concatenate([ids[:kept], ids[kept + surplus :]])

    def sequence(self, encoded: Encoded, surplus: int) -> Encoded:
        """The same for ids and their mask; the first token, which has nothing before it, is not scored."""
        ids, scored = (self.cut(array, surplus) for array in encoded)
        return ids, scored & (np.arange(len(ids)) > 0)

    def check(self) -> None:
        """Raise UserError with all prompts that don't fit."""
        self.errors.raise_if_any()

    def notes(self, examples: int) -> list[str]:
        """A line for the log where a prompt was cut."""
        if not self.prompts:
            return []
        return [
            f"{self.task.name}: prompts cut at their beginning: {self.prompts:,} of {examples:,}, by {self.tokens:,} "
            f"tokens together"
        ]

    def counts(self) -> dict[str, int]:
        """The same for the result file."""
        return {"prompts_cut": self.prompts, "prompt_tokens_cut": self.tokens}
