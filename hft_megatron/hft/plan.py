"""The plan: which units train in one round, as an immutable value that can be compared, saved, edited and loaded.

Trainability flags, gradient buckets, optimizer state, checkpoints and log lines all derive from it.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.schema import HFTConfig
from hft_megatron.errors import UserError
from hft_megatron.hft.plan_record import FIX, FORMAT, read_record
from hft_megatron.hft.selection import RULES, Draw, exact_ratio
from hft_megatron.hft.units import CATEGORIES, Category, Unit, units_of

SHORT_DIGEST_LENGTH = 12


@dataclass(frozen=True, kw_only=True)
class CategoryCount:
    """How much of one category trains, over the whole model."""

    category: Category
    units: int
    training_units: int
    parameters: int
    training_parameters: int

    @property
    def unit_ratio(self) -> float:
        """Realised share of the matrices (or norms) that trains."""
        return self.training_units / self.units

    @property
    def parameter_ratio(self) -> float:
        """Realised share of the parameters that trains; under grouped-query attention not the share of matrices."""
        return self.training_parameters / self.parameters


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which units train in one round. Equal for every TP x PP x DP layout of the same model, options and round."""

    ratio: float
    seed: int
    round: int
    selection: str
    """Name of the rule that drew it, a key of ``selection.RULES``."""
    units: tuple[Unit, ...]
    """All units of the model in canonical order."""
    training: frozenset[str]
    """Names of the units that train; the others rest."""

    def __post_init__(self) -> None:
        strangers = self.training - self._names
        assert not strangers, f"the training set holds units the model has not: {sorted(strangers)[:3]}"

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(unit.name for unit in self.units)

    def trains(self, name: str) -> bool:
        """Whether the unit of this Hugging Face module name trains; the name must be a unit of the model."""
        assert name in self._names, f"{name} is not a unit of this model"
        return name in self.training

    @cached_property
    def shape_fingerprint(self) -> str:
        """SHA-256 (hex) of the units' names and sizes: equal for models whose weights have the same sizes."""
        return _sha256([[unit.name, unit.parameters] for unit in self.units])

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything the plan says: two plans are equal exactly when their digests are."""
        return _sha256({**self._header(), "training": [unit.name for unit in self.units if self.trains(unit.name)]})

    @property
    def short_digest(self) -> str:
        """The start of the digest, for log lines."""
        return self.digest[:SHORT_DIGEST_LENGTH]

    @property
    def trainable_parameters(self) -> int:
        """Parameters that train, over the whole model."""
        return sum(unit.parameters for unit in self.units if self.trains(unit.name))

    @property
    def frozen_parameters(self) -> int:
        """Parameters that rest, over the whole model."""
        return sum(unit.parameters for unit in self.units) - self.trainable_parameters

    def counts(self) -> tuple[CategoryCount, ...]:
        """Counts of every category the model has, in canonical order."""
        return tuple(
            self._count(category) for category in CATEGORIES if any(u.category == category for u in self.units)
        )

    def _count(self, category: Category) -> CategoryCount:
        members = [unit for unit in self.units if unit.category == category]
        training = [unit for unit in members if self.trains(unit.name)]
        return CategoryCount(
            category=category,
            units=len(members),
            training_units=len(training),
            parameters=sum(unit.parameters for unit in members),
            training_parameters=sum(unit.parameters for unit in training),
        )

    def describe(self) -> str:
        """The plan in words for the log: one line for the whole, then one line per category."""
        lines = [
            f"plan {self.short_digest}: round {self.round}, ratio {self.ratio}, selection {self.selection}, "
            f"seed {self.seed}, trainable params {self.trainable_parameters:,}, "
            f"frozen params {self.frozen_parameters:,}"
        ]
        for count in self.counts():
            lines.append(
                f"  {count.category:<12} {count.training_units} of {count.units} units train "
                f"({count.unit_ratio:.1%}), {count.training_parameters:,} of {count.parameters:,} parameters "
                f"({count.parameter_ratio:.1%})"
            )
        return "\n".join(lines)

    def first_difference(self, other: "Plan") -> str | None:
        """Name of the first unit (in canonical order) that only one plan has or trains, else of the first option
        that differs, else None."""
        for mine, theirs in zip(self.units, other.units, strict=False):
            if mine != theirs or self.trains(mine.name) != other.trains(mine.name):
                return mine.name
        if len(self.units) != len(other.units):
            return max(self.units, other.units, key=len)[min(len(self.units), len(other.units))].name
        other_header = other._header()
        return next((key for key, value in self._header().items() if value != other_header[key]), None)

    def check_fits(self, shape: ModelShape, *, source: str) -> None:
        """Raise ``UserError`` naming ``source`` and the first unit where the plan is not one of this model."""
        model = {unit.name: unit for unit in units_of(shape)}
        refusal = f"{source} does not fit the model:"
        for unit in self.units:
            if unit.name not in model:
                raise UserError(f"{refusal} it lists {unit.name}, which the model does not have; {FIX}")
            if unit != model[unit.name]:
                raise UserError(
                    f"{refusal} {unit.name} is {_size(unit)}, the model's is {_size(model[unit.name])}; {FIX}"
                )
        missing = next((name for name in model if name not in self._names), None)
        if missing is not None:
            raise UserError(f"{refusal} it does not list {missing}; {FIX}")
        misplaced = next((unit.name for unit, name in zip(self.units, model, strict=True) if unit.name != name), None)
        if misplaced is not None:
            raise UserError(f"{refusal} {misplaced} is not at its place in the order; {FIX}")

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "shape_fingerprint": self.shape_fingerprint,
            "ratio": self.ratio,
            "seed": self.seed,
            "round": self.round,
            "selection": self.selection,
        }

    def to_json(self) -> str:
        """The canonical JSON text: one line per unit, so that a person can read it, edit ``trains`` and diff it."""
        return "\n".join(self._json_lines()) + "\n"

    def _json_lines(self) -> Iterator[str]:
        yield "{"
        for key, value in self._header().items():
            yield f"  {json.dumps(key)}: {json.dumps(value)},"
        yield '  "units": ['
        for position, unit in enumerate(self.units):
            row = {
                "name": unit.name,
                "layer": unit.layer,
                "category": unit.category,
                "parameters": unit.parameters,
                "trains": self.trains(unit.name),
            }
            yield f"    {json.dumps(row)}{',' if position + 1 < len(self.units) else ''}"
        yield "  ]"
        yield "}"

    @classmethod
    def from_json(cls, text: str, *, shape: ModelShape, source: str) -> "Plan":
        """Read what ``to_json`` wrote, possibly with ``trains`` edited by a person.

        ``source`` is the file or option, for messages. Raises ``UserError`` when the text is not a plan, when it does
        not fit the model (naming the first unit that does not), or when nothing in it trains.
        """
        record = read_record(text, source=source)
        exact_ratio(record["ratio"])
        if record["selection"] not in RULES:
            raise UserError(f"{source} has selection {record['selection']!r}, known are {', '.join(RULES)}; {FIX}")
        plan = cls(
            ratio=float(record["ratio"]),
            seed=record["seed"],
            round=record["round"],
            selection=record["selection"],
            units=tuple(Unit(**{k: v for k, v in row.items() if k != "trains"}) for row in record["units"]),
            training=frozenset(row["name"] for row in record["units"] if row["trains"]),
        )
        plan.check_fits(shape, source=source)
        if plan.shape_fingerprint != record["shape_fingerprint"]:
            raise UserError(f"{source} has an edited shape_fingerprint, only `trains` may be edited; {FIX}")
        if not plan.training:
            raise UserError(f"{source} rests every unit, so nothing would train; set `trains` to true for some.")
        return plan


def _size(unit: Unit) -> str:
    return f"{unit.category} of layer {unit.layer} with {unit.parameters:,} parameters"


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def make_plan(shape: ModelShape, config: HFTConfig, *, default_seed: int, round: int = 0) -> Plan:
    """Draw the plan of one round.

    ``default_seed`` (the run's ``--seed``) is used when ``--hft-seed`` is unset. Raises ``UserError`` for a ratio
    outside [0, 1].
    """
    rule = RULES["category"]
    seed = default_seed if config.hft_seed is None else config.hft_seed
    units = units_of(shape)
    draw = Draw(seed=seed, round=round)
    return Plan(
        ratio=float(config.hft_ratio),  # 1 and 1.0 must give one digest
        seed=seed,
        round=round,
        selection=rule.name,
        units=units,
        training=rule.training_set(units, ratio=exact_ratio(config.hft_ratio), draw=draw),
    )
