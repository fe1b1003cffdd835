"""The measures that a task's answers are scored with: every value is a function of sums over the task's examples.

A measure gives each example a few numbers, its statistics, and computes the value from their sums. So a value can be
computed from any selection of examples, which is all that a paired bootstrap needs.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from hft_megatron.evaluation.rouge import rouge_l
from hft_megatron.evaluation.sari import sari

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU

Statistics = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A score of a task, as one number."""

    name: str
    total: Callable[[Sequence[float]], float]
    """Function from the sums of the examples' statistics to the value."""
    higher_is_better: bool
    unit: str = ""
    """Unit for people: ``%``, ``nats``, ``bits``; empty without one."""
    of_tokens: bool = False
    """True if the value counts tokens, so that models with different tokenizers cannot be compared by it."""
    statistics: Callable[[str, Sequence[str], str], Statistics] | None = None
    """For a measure of texts: an example's statistics from the prediction, the references (one or more) and the source,
    which is the prompt's text; None where the kind of task computes them from log-probabilities."""


MEASURES: dict[str, Measure] = {}
"""Measures by name."""


def register(measure: Measure) -> None:
    """Adds a measure."""
    assert measure.name not in MEASURES, measure.name
    MEASURES[measure.name] = measure


def ratio(sums: Sequence[float]) -> float:
    """First sum over second; NaN where nothing was counted."""
    return sums[0] / sums[1] if sums[1] else math.nan


def percent(sums: Sequence[float]) -> float:
    """``ratio`` on the scale 0 to 100."""
    return 100 * ratio(sums)


def bits(sums: Sequence[float]) -> float:
    """``ratio`` of nats, in bits."""
    return ratio(sums) / math.log(2)


def perplexity(sums: Sequence[float]) -> float:
    """exp of the mean of nats; infinite where that exceeds a float."""
    try:
        return math.exp(ratio(sums))
    except OverflowError:
        return math.inf


def exact_match(prediction: str, references: Sequence[str], source: str) -> Statistics:
    """1 if the prediction is one of the references, character by character; an empty one never is."""
    return float(prediction != "" and prediction in references), 1.0


def edit_similarity(prediction: str, references: Sequence[str], source: str) -> Statistics:
    """rapidfuzz's ``ratio``, 0 to 100, with the nearest reference: 200 x (longest common subsequence) / (both lengths).

    It isn't rounded, where fuzzywuzzy's, which TRACE calls, is a whole number. 0 where one of the two is empty.
    """
    from rapidfuzz import fuzz

    similarities = (fuzz.ratio(prediction, reference) for reference in references if reference)
    return max(similarities, default=0.0) if prediction else 0.0, 1.0


_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)


def with_literals(code: str) -> str:
    """Code of the Py150 corpus with its placeholders replaced, as TRACE does before it compares.

    ``<NUM_LIT>`` becomes 0, ``<STR_LIT>`` and ``<CHAR_LIT>`` nothing, and ``<NUM_LIT:1>`` (of any of the three) its 1.
    """
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return _LITERAL.sub(r"\1", code)


def code_similarity(prediction: str, references: Sequence[str], source: str) -> Statistics:
    """``edit_similarity`` of both codes after ``with_literals``."""
    return edit_similarity(with_literals(prediction), [with_literals(reference) for reference in references], source)


def best_rouge_l(prediction: str, references: Sequence[str], source: str) -> Statistics:
    """ROUGE-L with the reference for which it is highest, in percent."""
    return max(rouge_l(prediction, reference) for reference in references), 1.0


def sari_of_sentence(prediction: str, references: Sequence[str], source: str) -> Statistics:
    """SARI with all references, in percent. The formula also applies to an empty prediction, as in TRACE."""
    return sari(source, prediction, references), 1.0


@cache
def _bleu() -> "type[BLEU]":
    from sacrebleu.metrics.bleu import BLEU  # slow to import: only when asked for

    return BLEU


def bleu_statistics(prediction: str, references: Sequence[str], source: str) -> Statistics:
    """Matches of 1 to 4-grams, their totals, and the lengths of the prediction and of the reference nearest to it."""
    score = _bleu()(force=True).corpus_score([prediction], [[reference] for reference in references])
    return (*map(float, score.counts), *map(float, score.totals), float(score.sys_len), float(score.ref_len))


def corpus_bleu(sums: Sequence[float]) -> float:
    """sacrebleu's BLEU with its defaults: words by its tokenizer 13a, case-sensitive, exponential smoothing.

    It isn't the mean of BLEU scores of sentences by nltk that TRACE prints beside its headline scores.
    """
    return float(
        _bleu()
        .compute_bleu(
            correct=[int(count) for count in sums[:4]],
            total=[int(count) for count in sums[4:8]],
            sys_len=int(sums[8]),
            ref_len=int(sums[9]),
            smooth_method="exp",
        )
        .score
    )


# The choice, or the answer of a pair, that the model finds most likely is the right one: (hit, 1) by the sum of the
# log-probabilities of its tokens, by their mean, or by the sum over UTF-8 bytes. lm-evaluation-harness's acc is the
# first; its acc_norm divides by characters, which are the bytes of English texts.
register(Measure(name="accuracy", total=percent, higher_is_better=True, unit="%"))
register(Measure(name="accuracy_per_token", total=percent, higher_is_better=True, unit="%", of_tokens=True))
register(Measure(name="accuracy_per_byte", total=percent, higher_is_better=True, unit="%"))
register(Measure(name="preference_accuracy", total=percent, higher_is_better=True, unit="%"))
register(Measure(name="preference_accuracy_per_token", total=percent, higher_is_better=True, unit="%", of_tokens=True))
# The share of the choices' probability that the correct ones have (TruthfulQA's mc2): (share, 1).
register(Measure(name="probability", total=percent, higher_is_better=True, unit="%"))

# Of texts: (nats, tokens), and (nats, UTF-8 bytes), which doesn't depend on how a tokenizer cuts them.
register(Measure(name="cross_entropy", total=ratio, higher_is_better=False, unit="nats", of_tokens=True))
register(Measure(name="perplexity", total=perplexity, higher_is_better=False, of_tokens=True))
register(Measure(name="bits_per_byte", total=bits, higher_is_better=False, unit="bits"))

# Of texts, a tuned model beside its base: (nats, tokens). Forgetting is the tuned one's cross-entropy less the base's;
# the divergences are sums over the vocabulary, in the place of each scored token.
DIVERGENCES = ("kl_base_tuned", "kl_tuned_base")
AGAINST_BASE = ("base_cross_entropy", "forgetting", *DIVERGENCES)
for name in AGAINST_BASE:
    register(Measure(name=name, total=ratio, higher_is_better=False, unit="nats", of_tokens=True))

# Of generated answers. An empty answer counts as an example and scores 0, as in TRACE.
register(Measure(name="exact_match", total=percent, higher_is_better=True, unit="%", statistics=exact_match))
register(Measure(name="bleu", total=corpus_bleu, higher_is_better=True, statistics=bleu_statistics))
register(Measure(name="rouge_l", total=ratio, higher_is_better=True, statistics=best_rouge_l))
register(Measure(name="sari", total=ratio, higher_is_better=True, statistics=sari_of_sentence))
register(Measure(name="edit_similarity", total=ratio, higher_is_better=True, statistics=edit_similarity))
register(Measure(name="code_similarity", total=ratio, higher_is_better=True, statistics=code_similarity))
