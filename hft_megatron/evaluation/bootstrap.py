"""Bootstrap intervals: the dependence of a value, or of two models' difference, on the drawn examples."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Total = Callable[[Sequence[float]], float]
"""Function from the sums of a measure's statistics to its value."""

_DRAWS_AT_ONCE = 1 << 20
"""Examples drawn at a time: some 16 MiB."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value of all examples, and the bounds of its confidence interval."""

    value: float
    low: float
    high: float
    """Upper bound. Both bounds are infinite for a single example, whose spread is unknown."""


def interval(
    statistics: ArrayLike, total: Total, *, level: float = 0.95, samples: int = 2000, seed: int = 0
) -> Interval:
    """The percentile interval (Efron 1979; Efron and Tibshirani 1993, section 13.3) of one model's value.

    ``statistics`` are (examples, statistics). A sample draws as many examples as there are, with replacement, and its
    value is ``total`` of their sums; the bounds leave out (1 - ``level``)/2 of the samples' values on either side. The
    same ``seed`` draws the same examples, whatever is measured on them.
    """
    array = _as_array(statistics)
    values = [total(sums.tolist()) for counts in _draws(len(array), samples, seed) for sums in counts @ array]
    return _percentiles(total(array.sum(axis=0).tolist()), values, len(array), level)


def paired_difference(
    first: ArrayLike, second: ArrayLike, total: Total, *, level: float = 0.95, samples: int = 2000, seed: int = 0
) -> Interval:
    """The interval of the second model's value minus the first's (paired bootstrap resampling: Koehn 2004, EMNLP).

    Both are (examples, statistics) of the same examples in the same order. Every sample draws the same examples for
    both, so that examples that are hard for both don't widen the interval. Otherwise like ``interval``.
    """
    one, other = _as_array(first), _as_array(second)
    assert one.shape == other.shape, (one.shape, other.shape)
    differences = [
        total(of_other.tolist()) - total(of_one.tolist())
        for counts in _draws(len(one), samples, seed)
        for of_one, of_other in zip(counts @ one, counts @ other, strict=True)
    ]
    value = total(other.sum(axis=0).tolist()) - total(one.sum(axis=0).tolist())
    return _percentiles(value, differences, len(one), level)


def _as_array(statistics: ArrayLike) -> NDArray[np.float64]:
    array = np.ascontiguousarray(statistics, dtype=np.float64)
    assert array.ndim == 2, array.shape
    assert len(array), "no examples"
    return array


def _draws(examples: int, samples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Number of times each sample draws each example: (samples, examples), in parts, ``samples`` rows together."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // examples)
    for start in range(0, samples, at_once):
        rows = min(at_once, samples - start)
        # Counted in one call, each sample in a range of its own: eight times as fast as drawing multinomial counts.
        drawn = generator.integers(examples, size=(rows, examples)) + np.arange(rows)[:, None] * examples
        yield np.bincount(drawn.ravel(), minlength=rows * examples).reshape(rows, examples).astype(np.float64)


def _percentiles(value: float, values: Sequence[float], examples: int, level: float) -> Interval:
    if examples == 1:
        return Interval(value=value, low=-math.inf, high=math.inf)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=value, low=float(low), high=float(high))
