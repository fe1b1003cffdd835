"""Questions to a model in batches, spread over its data-parallel replicas.

Batches depend on the questions alone: neither the number of replicas nor the answers of a killed command change an
answer, down to its last bit.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hft_megatron.data.tokenizer import Encoded
from hft_megatron.errors import RunFailed
from hft_megatron.evaluation.examples import Answer, Generated
from hft_megatron.evaluation.forward import ModelInPlace, is_speaker
from hft_megatron.evaluation.generation import Decoder, GenerationRules, generate
from hft_megatron.evaluation.scoring import score
from hft_megatron.parallel.consensus import gathered
from hft_megatron.parallel.groups import Placement

PROGRESS_S = 10.0
"""Seconds between two progress lines of a task."""
TOKENS_OF_A_BATCH = 32_768
"""Maximum tokens of a batch with more than one question: 16 windows of a long context don't fit."""


class NotFinite(RunFailed):
    """The model's output is not finite, on every rank alike."""


Ask = Callable[[Sequence[int]], Sequence[Answer] | None]
"""Asks a batch of questions, by their numbers; collective over a replica's ranks, None off its last stage."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Prompts to be continued by ``rules``, or sequences whose log-probabilities are wanted."""

    prompts: Sequence[NDArray[np.int32]] = ()
    rules: GenerationRules | None = None
    sequences: Sequence[Encoded] = ()

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of every question."""
        return [len(ids) for ids in self.prompts or [ids for ids, _ in self.sequences]]

    def put(self, model: ModelInPlace, tokenizer: Decoder, batch: Sequence[int]) -> Sequence[Answer] | None:
        """The answers to some of them, by their numbers; see ``Ask``."""
        if self.rules is None:
            return score(model, [self.sequences[number] for number in batch])
        return generate(model, tokenizer, [self.prompts[number] for number in batch], self.rules, numbers=batch)


def batches_of(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of questions with these lengths, at most ``size`` and ``TOKENS_OF_A_BATCH`` at a time, the longest first,
    so that a batch's questions have similar lengths."""
    batches: list[list[int]] = []
    tokens = 0
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        tokens += lengths[number]
        if not batches or len(batches[-1]) == size or tokens > TOKENS_OF_A_BATCH:
            batches.append([])
            tokens = lengths[number]
        batches[-1].append(number)
    return batches


@dataclass
class Progress:
    """Reports progress every ``PROGRESS_S``."""

    name: str
    say: Callable[[str], None]
    total: int = field(default=0, init=False)
    """Total number of questions; set by ``answers_of``."""
    _done: int = 0
    _start: float = field(default_factory=time.monotonic)
    _said: float = field(default_factory=time.monotonic)

    def add(self, answered: int) -> None:
        """Counts further answers."""
        self._done += answered
        now = time.monotonic()
        if now - self._said < PROGRESS_S:
            return
        self._said = now
        rate = self._done / (now - self._start)
        left = (self.total - self._done) / rate
        self.say(f"  {self.name}: {self._done} of {self.total} answered, {rate:.3g}/s, {_in_words(left)} left")


def _in_words(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def answers_of(
    lengths: Sequence[int],
    ask: Ask,
    placement: Placement,
    *,
    batch_size: int,
    progress: Progress,
    known: Mapping[int, Sequence[Answer]] | None = None,
    keep: Callable[[int, Sequence[Answer]], None] | None = None,
) -> list[Answer]:
    """The answers to questions of ``lengths`` tokens, in their order, on every rank; collective over all ranks.

    ``known`` are the answers of whole batches by their number, the same on every rank. ``keep`` gets every other batch
    on every rank, as soon as it is there. Raises NotFinite on every rank where the model's output is not finite.
    """
    batches = batches_of(lengths, batch_size)
    found: dict[int, Sequence[Answer]] = dict(known or {})
    todo = [number for number in range(len(batches)) if number not in found]
    progress.total = sum(len(batches[number]) for number in todo)
    replicas, replica = placement.data_size, placement.data_rank
    for first in range(0, len(todo), replicas):
        mine = todo[first : first + replicas][replica : replica + 1]
        answered = {number: ask(batches[number]) for number in mine}
        for of_rank in gathered(answered if is_speaker(placement) else {}):
            for number, answers in of_rank.items():
                assert answers is not None, "the last stage speaks"
                if not all(map(_is_finite, answers)):
                    raise NotFinite(
                        f"{progress.name}: the model's logits are not finite; read the model as fp32 "
                        f"(--no-bf16), or evaluate an earlier checkpoint."
                    )
                found[number] = answers
                progress.add(len(answers))
                if keep is not None:
                    keep(number, answers)
    in_order: list[Answer | None] = [None] * len(lengths)
    for number, batch in enumerate(batches):
        for question, answer in zip(batch, found[number], strict=True):
            in_order[question] = answer
    return in_order  # type: ignore[return-value]


def _is_finite(answer: Answer) -> bool:
    if isinstance(answer, Generated):
        return answer.ended_by != "no number"
    return all(math.isfinite(value) for value in vars(answer).values())
