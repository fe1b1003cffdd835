"""The choice of units: the options that fix a plan, as one value that checkpoints record, and the randomness.

Pure: the result depends on seed, round, purpose and candidates, and on nothing else (no global RNG, no layout, no
Python version).
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from math import floor
from typing import Any

from hft_megatron.config.declared import declared
from hft_megatron.config.derived import patterns
from hft_megatron.config.hft import Counting, HFTConfig, Level, Pairing, Rotation
from hft_megatron.config.names import SelectionName
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The randomness of one round. Draws for different purposes are independent of each other.

    Every candidate gets the SHA-256 of (seed, round, purpose, candidate); the smallest hashes are chosen: uniform over
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


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The part of ``HFTConfig`` that chooses units; its fields have the meaning of the options of the same name."""

    ratio: float
    level: Level = "category"
    selection: SelectionName = "random"
    counting: Counting = "matrices"
    pairing: Pairing = "independent"
    rotation: Rotation = "independent"
    seed: int
    freeze_embedding: bool = False
    freeze_head: bool = False
    train: tuple[str, ...] = ()
    """Patterns of the units that train in every round."""
    freeze: tuple[str, ...] = ()
    """Patterns of the units that are frozen in every round."""

    @classmethod
    def from_config(cls, config: HFTConfig, *, default_seed: int) -> "Policy":
        """The policy of options that the config's rules accept.

        ``default_seed`` (the run's ``--seed``) is used when ``--hft-seed`` is unset.
        """
        chosen = {field.name: getattr(config, f"hft_{field.name}") for field in fields(cls)}
        # 1 and 1.0 must give one digest.
        chosen |= {"ratio": float(config.hft_ratio), "train": patterns(config.hft_train)}
        chosen |= {"seed": default_seed if config.hft_seed is None else config.hft_seed}
        return cls(**{**chosen, "freeze": patterns(config.hft_freeze)})

    @classmethod
    def from_dict(cls, values: Any, *, source: str) -> "Policy":
        """The inverse of ``to_dict``. Raises ``UserError`` naming ``source`` and the first field that is not valid."""
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or values.keys() != set(names):
            raise UserError(f"{source} must have a policy with exactly the fields {', '.join(names)}; draw a new plan.")
        for name in names:
            if not _is_possible(name, values[name]):
                raise UserError(f"{source}: the policy's {name} {values[name]!r} is not valid; draw a new plan.")
        return cls(**{**values, **{name: tuple(values[name]) for name in ("train", "freeze")}})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "train": list(self.train), "freeze": list(self.freeze)}

    @property
    def exact_ratio(self) -> Fraction:
        """The ratio as written in decimal."""
        return exact_ratio(self.ratio)

    @property
    def rule(self) -> str:
        """Name of the selection rule: the level for random draws, else the selection."""
        return self.level if self.selection == "random" else self.selection

    def describe(self) -> str:
        """Description for the log; counting, pairing, rotation and freezes only where not at their default."""
        selection = f"random by {self.level}" if self.selection == "random" else self.selection
        words = [f"ratio {self.ratio}", f"selection {selection}", f"seed {self.seed}"]
        words += [
            f"{name} {getattr(self, name)}"
            for name in ("counting", "pairing", "rotation")
            if getattr(self, name) != getattr(HFTConfig(), f"hft_{name}")
        ]
        words += [f"{what} frozen" for what in ("embedding", "head") if getattr(self, f"freeze_{what}")]
        words += [f"{name} {','.join(getattr(self, name))}" for name in ("train", "freeze") if getattr(self, name)]
        return ", ".join(words)


def check_choice(name: str, value: Any) -> None:
    """Raises ValueError where ``value`` is not valid for the field ``name`` of a policy."""
    option = declared(HFTConfig)[f"hft_{name}"]
    if not option.allows(value):
        raise ValueError(f"{name}={value!r} must be {option.expected}.")


def _is_possible(name: str, value: Any) -> bool:
    """Return whether a field read from a file may have this value."""
    if name in ("train", "freeze"):
        return isinstance(value, list) and all(isinstance(pattern, str) for pattern in value)
    return declared(HFTConfig)[f"hft_{name}"].allows(value)
