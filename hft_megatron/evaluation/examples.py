"""Questions and answers of one example of a task."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hft_megatron.data.tokenizer import Encoded

EndedBy = Literal["end token", "stop string", "length", "no number"]
"""Reasons why a generation ended. ``no number``: the model's logits were not finite, which fails the evaluation."""


@dataclass(frozen=True, kw_only=True)
class EvalExample:
    """One example: either a prompt to continue, or sequences whose log-probabilities are wanted."""

    place: str
    """Its place, such as ``test.jsonl:12``; unique in its task."""
    prompt: NDArray[np.int32] | None = None
    """Ids of shape (tokens,) that generation continues; None where nothing is generated."""
    sequences: tuple[Encoded, ...] = ()
    """Ids and which of them are scored, both of shape (tokens,). The first token of a sequence is never scored, because
    nothing before it predicts it. A sequence may have one token more than the model reads, because the last one is only
    predicted."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Data that the kind needs to score answers: references, byte lengths, the right choices."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The continuation of a prompt."""

    ids: tuple[int, ...]
    """Ids without an end token, but with the tokens of a stop string."""
    text: str
    ended_by: EndedBy


@dataclass(frozen=True, kw_only=True)
class SequenceScore:
    """A model's score of a sequence."""

    log_prob: float
    """Nats, summed over the scored tokens in double precision."""
    tokens: int
    """Scored tokens."""
    is_greedy: bool
    """True if every scored token is the model's most likely one."""


@dataclass(frozen=True, kw_only=True)
class TaskExamples:
    """The examples of a task, and an account of the rows read."""

    examples: tuple[EvalExample, ...]
    notes: tuple[str, ...] = ()
    """Lines for the log: numbers of prompts cut, rows left out and so on."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """The same as numbers, for the result file."""


@dataclass(frozen=True, kw_only=True)
class TextDifference:
    """Difference of two models on the scored tokens of one sequence: sums in nats, in double precision."""

    tokens: int
    base_nats: float
    """Minus the log-probability of the tokens under the base model."""
    tuned_nats: float
    kl_base_tuned: float
    """Sum over the tokens of KL(base || tuned) between the models' predictions of them."""
    kl_tuned_base: float


Answer = Generated | SequenceScore | TextDifference
"""Answer to one question."""
