"""Tasks that score documents: the model's prediction of each of their tokens."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hft_megatron.data.tokenizer import Encoded, Piece, Place, Tokenizer
from hft_megatron.errors import UserError
from hft_megatron.evaluation.columns import text_of
from hft_megatron.evaluation.examples import EvalExample, Generated, TaskExamples
from hft_megatron.evaluation.kinds.kind import Answer
from hft_megatron.evaluation.task_rows import read_task_rows
from hft_megatron.evaluation.tasks import Task, TaskKind

_NO_CHARACTER = "\ufffd"
"""A tokenizer's output for bytes that are not a whole character."""


class Documents:
    """See Kind."""

    name: TaskKind = "text"
    default_metrics: tuple[str, ...] = ("perplexity", "bits_per_byte")

    def metrics(self) -> tuple[str, ...]:
        return ("perplexity", "cross_entropy", "bits_per_byte")

    def read(self, task: Task, tokenizer: Tokenizer, window: int) -> TaskExamples:
        size, stride = _sizes(task, window)
        rows = read_task_rows(task)
        texts = [(row, text) for row in rows if (text := text_of(task.text, "text", row.row))]
        encoded = tokenizer.encode_pieces([_pieces(text, tokenizer, task) for _, text in texts])
        examples = []
        for (row, text), (ids, _) in zip(texts, encoded, strict=True):
            if len(ids) < 2:
                continue
            unscored = 0 if tokenizer.bos_id is not None else _bytes_of_first(ids.tolist(), text, tokenizer)
            facts = {"bytes": len(text.encode()) - unscored}
            sequences = tuple(windows_of(ids, size, stride))
            examples.append(EvalExample(place=row.name, sequences=sequences, facts=facts))
        if not examples:
            raise UserError(f"{task.place}: the task {task.name} is empty: no row has a text to score.")
        counts = {
            "empty_documents": len(rows) - len(examples),
            "windows": sum(len(example.sequences) for example in examples),
            "unscored_tokens": 0 if tokenizer.bos_id is not None else len(examples),
        }
        notes = []
        if counts["empty_documents"]:
            notes.append(
                f"{task.name}: documents left out, which have no token to score: {counts['empty_documents']:,} of "
                f"{len(rows):,}"
            )
        if counts["unscored_tokens"]:
            notes.append(
                f"{task.name}: the first token of each of the {len(examples):,} documents is not scored, because the "
                f"tokenizer puts no begin token before it"
            )
        return TaskExamples(examples=tuple(examples), notes=tuple(notes), counts=counts)

    def record(self, task: Task, example: EvalExample, answer: Answer) -> dict[str, Any]:
        assert not isinstance(answer, Generated)
        nats = -math.fsum(score.log_prob for score in answer)
        tokens, size = sum(score.tokens for score in answer), example.facts["bytes"]
        per = {"perplexity": tokens, "cross_entropy": tokens, "bits_per_byte": size}
        return {
            "example": example.place,
            "nats": nats,
            "tokens": tokens,
            "bytes": size,
            "statistics": {name: [nats, float(per[name])] for name in task.metrics},
        }


def _sizes(task: Task, window: int) -> tuple[int, int]:
    """The task's window and stride. Raises UserError where the model's window is smaller, or they don't fit
    together."""
    size = task.window or window
    if size > window:
        raise UserError(
            f"{task.place}: window {size} of the task {task.name} is more than the {window} tokens that the model "
            f"reads; make it at most {window}."
        )
    stride = task.stride or size
    if stride > size:
        raise UserError(
            f"{task.place}: stride {stride} of the task {task.name} is more than the window of {size}, so that tokens "
            f"between two windows would not be scored; make it at most {size}."
        )
    return size, stride


def _pieces(text: str, tokenizer: Tokenizer, task: Task) -> list[Piece]:
    """The pieces of ``data.examples.completion_pieces`` for a text that is trained whole; with the end token if it is
    scored."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.special(tokenizer.bos_id, trained=False)]
    end = [tokenizer.special(tokenizer.eos_id, trained=True)] if task.end_token else []
    return [*begin, Piece(text=text, place=Place.START, trained=True), *end]


def _bytes_of_first(ids: list[int], text: str, tokenizer: Tokenizer) -> int:
    """Number of UTF-8 bytes of ``text`` in its first token."""
    first = tokenizer.decode(ids[:1])
    if text.startswith(first):
        return len(first.encode())
    before = first.rstrip(_NO_CHARACTER)
    begun = text[: len(before) + 1]
    if first == before or not begun.startswith(before):
        return 0
    # It ends within a character, which has at most four bytes. In a text that begins after the token, each of the
    # remaining bytes of the character has become one replacement character.
    for count in range(2, 5):
        whole = tokenizer.decode(ids[:count])
        if whole.startswith(begun):
            left = len(tokenizer.decode(ids[1:count])) - (len(whole) - len(begun))
            return len(begun.encode()) - left
    return len(before.encode())


def windows_of(ids: NDArray[np.int32], window: int, stride: int) -> Iterator[Encoded]:
    """The document's ids in windows, with the tokens scored in each: each token except the first is scored once.

    With the tokens x_0 ... x_n, window k (from 0) has x_{k stride} ... x_{k stride + window}, of which the last is only
    predicted. It scores the tokens after x_{(k - 1) stride + window}, the last one of the window before it; the first
    window scores all except x_0. So a token has at least ``window - stride`` others before it, apart from the
    document's
    first ones; with ``stride`` equal to ``window`` at least one. That is the strided window of Hugging Face's guide on
    perplexity (Perplexity of fixed-length models), whose windows there predict a token less.
    """
    scored_to = 0
    for begin in range(0, len(ids), stride):
        part = ids[begin : begin + window + 1]
        yield part, np.arange(begin, begin + len(part)) > scored_to
        scored_to = begin + len(part) - 1
        if scored_to == len(ids) - 1:
            return
