"""--loss-spike-threshold: iterations whose loss stands far from those before it."""

from collections import deque
from dataclasses import dataclass, field
from math import isfinite
from statistics import median

WINDOW = 100
"""Finished iterations that a loss is compared with; a run that is resumed begins to gather them anew."""
FEWEST = 20
"""With fewer nothing is judged: losses fall fast at the start, and a median of a few says little."""
SIGMAS_PER_DEVIATION = 1.4826
"""Of a normal distribution the standard deviation over the median absolute deviation (Hampel 1974)."""


@dataclass
class LossSpikes:
    """Tells spikes by the robust z-score, |loss - median| / (1.4826 x median absolute deviation)."""

    threshold: float | None
    """Smallest score of a spike; None finds none."""
    _recent: "deque[float]" = field(default_factory=lambda: deque(maxlen=WINDOW))

    def score(self, loss: float) -> float | None:
        """The z-score of an iteration's loss where it is a spike, else None; from then on it is one of the window's.

        None too where the window has no spread, and for a loss that is no number, which the window is spared.
        """
        if self.threshold is None or not isfinite(loss):
            return None
        before = tuple(self._recent)
        self._recent.append(loss)
        if len(before) < FEWEST:
            return None
        middle = median(before)
        spread = SIGMAS_PER_DEVIATION * median(abs(one - middle) for one in before)
        score = abs(loss - middle) / spread if spread > 0 else 0.0
        return score if score > self.threshold else None
