"""What a model is asked of one example of a task, and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hft_megatron.data.tokenizer import Encoded

EndedBy = Literal["end token", "stop string", "length", "no number"]
"""The last: the model's logits were no finite numbers, which fails the evaluation."""


@dataclass(frozen=True, kw_only=True)
class EvalExample:
    """One example: either a prompt that is continued, or sequences whose log-probabilities are asked."""

    place: str
    """Where it stands, such as ``test.jsonl:12``; unique in its task."""
    prompt: NDArray[np.int32] | None = None
    """Ids of shape (tokens,) that generation continues; None where nothing is generated."""
    sequences: tuple[Encoded, ...] = ()
    """Ids and which of them are scored, both of shape (tokens,). The first token of a sequence is never scored: there
    is nothing before it to expect it from. A sequence may have one token more than the model reads, because the last
    one is only predicted."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the kind needs once there are answers: references, byte lengths, which choices are right."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The continuation of a prompt."""

    ids: tuple[int, ...]
    """Without an end token; the tokens that a stop string came with are there."""
    text: str
    ended_by: EndedBy


@dataclass(frozen=True, kw_only=True)
class SequenceScore:
    """What a model gives a sequence."""

    log_prob: float
    """Nats, summed over the scored tokens in double precision."""
    tokens: int
    """Scored tokens."""
    is_greedy: bool
    """Whether every scored token is the model's most likely one."""


@dataclass(frozen=True, kw_only=True)
class TaskExamples:
    """The examples of a task, and the account of what was read."""

    examples: tuple[EvalExample, ...]
    notes: tuple[str, ...] = ()
    """Lines for the log: how many prompts were cut, rows left out and so on."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """The same as numbers, for the result file."""


@dataclass(frozen=True, kw_only=True)
class TextDifference:
    """Two models on the scored tokens of one sequence: sums in nats, in double precision."""

    tokens: int
    base_nats: float
    """Minus the log-probability of the tokens under the base model."""
    tuned_nats: float
    kl_base_tuned: float
    """Sum over the tokens of KL(base || tuned) between what the models expect in their place."""
    kl_tuned_base: float


Answer = Generated | SequenceScore | TextDifference
"""To one question."""
