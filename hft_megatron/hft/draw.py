"""The randomness of the method and its rounding: hashes instead of a generator, exact fractions instead of doubles.

Pure: the result depends on seed, round, purpose and candidates, and on nothing else (no global RNG, no layout, no
Python version).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import floor


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The randomness of one round. Draws for different purposes are independent of each other.

    Every candidate gets the SHA-256 of (seed, round, purpose, candidate) and the smallest hashes win: uniform over
    subsets, independent of the order of the candidates, and the same in every Python and on every machine, which
    ``random.sample`` does not promise.
    """

    seed: int
    round: int

    def choose(self, candidates: Iterable[str], count: int, *, purpose: str) -> frozenset[str]:
        """``count`` of the distinct ``candidates``, every subset of that size equally likely."""
        names = self.shuffle(candidates, purpose=purpose)
        assert 0 <= count <= len(names), f"cannot choose {count} of {len(names)} for {purpose}"
        return frozenset(names[:count])

    def shuffle(self, candidates: Iterable[str], *, purpose: str) -> list[str]:
        """The distinct ``candidates``, every order equally likely."""
        return sorted(set(candidates), key=lambda name: self._key(purpose, name))

    def _key(self, purpose: str, candidate: str) -> bytes:
        return hashlib.sha256(f"hft|{self.seed}|{self.round}|{purpose}|{candidate}".encode()).digest()


def exact_ratio(ratio: float) -> Fraction:
    """The ratio as the user wrote it in decimal: 0.35 becomes 7/20 and not the double nearest to it."""
    assert 0 <= ratio <= 1, f"ratio {ratio} got past the rules of the options"
    return Fraction(str(ratio))


def nearest(value: Fraction) -> int:
    """floor(value + 1/2): the nearest whole number, a half rounded up."""
    return floor(value + Fraction(1, 2))
