"""The plan: which units train in one round, as an immutable value that can be compared, saved, edited and loaded.

Trainability flags, gradient buckets, optimizer state, checkpoints and log lines all derive from it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.names import SELECTIONS
from hft_megatron.errors import UserError
from hft_megatron.hft.plan_record import FIX, PlanRecord, read_record, write_record
from hft_megatron.hft.policy import Policy
from hft_megatron.hft.selection import training_units
from hft_megatron.hft.units import CATEGORIES, Category, Unit, units_of

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer

SHORT_DIGEST_LENGTH = 12


@dataclass(frozen=True, kw_only=True)
class CategoryCount:
    """Amount of one category that trains, over the whole model."""

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
    """The units that train in one round. Equal for every TP x PP x DP layout of the same model, options and round."""

    policy: Policy
    """Policy of the draw; a person may have edited ``training`` since."""
    round: int
    units: tuple[Unit, ...]
    """All units of the model in canonical order."""
    training: frozenset[str]
    """Names of the units that train; the others are frozen."""

    def __post_init__(self) -> None:
        strangers = self.training - self._names
        assert not strangers, f"the training set holds units the model has not: {sorted(strangers)[:3]}"

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(unit.name for unit in self.units)

    def trains(self, name: str) -> bool:
        """Return whether the unit of this Hugging Face module name trains; it must be a unit of the model."""
        assert name in self._names, f"{name} is not a unit of this model"
        return name in self.training

    @cached_property
    def shape_fingerprint(self) -> str:
        """SHA-256 (hex) of the units' names and sizes: equal for models whose weights have the same sizes."""
        return _sha256([[unit.name, unit.parameters] for unit in self.units])

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the whole plan: two plans are equal exactly when their digests are."""
        training = [unit.name for unit in self.units if self.trains(unit.name)]
        return _sha256({**self._options(), "shape_fingerprint": self.shape_fingerprint, "training": training})

    @property
    def short_digest(self) -> str:
        """The start of the digest, for log lines."""
        return self.digest[:SHORT_DIGEST_LENGTH]

    @cached_property
    def trainable_parameters(self) -> int:
        """Parameters that train, over the whole model."""
        return sum(unit.parameters for unit in self.units if self.trains(unit.name))

    @cached_property
    def frozen_parameters(self) -> int:
        """Parameters that are frozen, over the whole model."""
        return sum(unit.parameters for unit in self.units) - self.trainable_parameters

    def apply(self, model: "Module", optimizer: "Optimizer | None" = None) -> None:
        """Freezes what the plan freezes in ``model``, any torch module whose parameters have Hugging Face's names.

        Trainable units get ``requires_grad``, frozen ones lose it and their gradient. Where PEFT has put adapters into
        the model, these follow their unit and all of the model's own weights stay frozen. The plan persists through
        ``train()``, gradient checkpointing and tied embeddings; where something else changes ``requires_grad``
        afterwards, the next forward pass in training raises RuntimeError. Build the optimizer (and
        DistributedDataParallel or FSDP) afterwards, so that frozen weights cost no gradient and no state. Raises
        ValueError for an ``optimizer`` that holds frozen weights, and for a model that the plan does not fit.
        """
        from hft_megatron.hft.on_modules import apply_to_module

        apply_to_module(self, model, optimizer)

    def audit(self, model: "Module") -> Callable[[], None]:
        """Fingerprints the frozen weights of ``model``, to which the plan was applied.

        The function that it returns raises RuntimeError, with the first name, where a bit of them has changed since.
        """
        from hft_megatron.hft.on_modules import audit_module

        return audit_module(self, model)

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
        """Description of the plan for the log: one line for the whole, then one line per category."""
        chosen = "all adapters" if any(unit.category == "adapter" for unit in self.units) else self.policy.describe()
        lines = [
            f"plan {self.short_digest}: round {self.round}, {chosen}, "
            f"trainable params {self.trainable_parameters:,}, frozen params {self.frozen_parameters:,}"
        ]
        num_layers = 1 + max(unit.layer for unit in self.units if unit.layer is not None)
        if self.policy.pairing == "complementary" and num_layers % 2:
            lines.append(f"  layer {num_layers - 1} has no partner and was drawn alone")
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
        theirs_by_name = other._options()
        return next((name for name, value in self._options().items() if value != theirs_by_name[name]), None)

    def check_fits(self, shape: ModelShape, *, source: str) -> None:
        """Raise ``UserError`` naming ``source`` and the first unit where the plan is not one of this model."""
        model = {unit.name: unit for unit in units_of(shape)}
        refusal = f"{source} does not fit the model:"
        for unit in self.units:
            if unit.name not in model:
                raise UserError(f"{refusal} it lists {unit.name}, which the model does not have; {FIX}")
            if unit != model[unit.name]:
                raise UserError(
                    f"{refusal} {unit.name} is {_size(unit)}, but the model's is {_size(model[unit.name])}; {FIX}"
                )
        missing = next((name for name in model if name not in self._names), None)
        if missing is not None:
            raise UserError(f"{refusal} it does not list {missing}; {FIX}")
        misplaced = next((unit.name for unit, name in zip(self.units, model, strict=True) if unit.name != name), None)
        if misplaced is not None:
            raise UserError(f"{refusal} {misplaced} is out of order; {FIX}")

    def _options(self) -> dict[str, Any]:
        return {**self.policy.to_dict(), "round": self.round}

    def to_json(self) -> str:
        """The canonical JSON text of this one plan, as it lies in a checkpoint; ``plan_file`` writes several."""
        return write_record(
            PlanRecord(
                shape_fingerprint=self.shape_fingerprint,
                policy=self.policy,
                rounds=(self.round,),
                units=self.units,
                training=(self.training,),
            )
        )

    @classmethod
    def from_json(cls, text: str, *, shape: ModelShape, source: str) -> "Plan":
        """Read what ``to_json`` wrote, possibly with ``trains`` edited by a person.

        ``source`` is the file or option, for messages. Raises ``UserError`` when the text is not one plan, when it does
        not fit the model (naming the first unit that does not), or when nothing in it trains.
        """
        record = read_record(text, source=source)
        if len(record.rounds) != 1:
            raise UserError(f"{source} has the plans of {len(record.rounds)} rounds, but must have one; {FIX}")
        return cls.from_record(record, 0, shape=shape, source=source)

    @classmethod
    def from_record(cls, record: PlanRecord, index: int, *, shape: ModelShape, source: str) -> "Plan":
        """The plan at ``index`` of a file's rounds, with ``from_json``'s errors."""
        plan = cls(
            policy=record.policy, round=record.rounds[index], units=record.units, training=record.training[index]
        )
        plan.check_fits(shape, source=source)
        if plan.shape_fingerprint != record.shape_fingerprint:
            raise UserError(f"{source} has an edited shape_fingerprint, but only `trains` may be edited; {FIX}")
        if not plan.training:
            raise UserError(
                f"{source} freezes every unit in round {plan.round}, so nothing would train; "
                "set `trains` to true for some."
            )
        return plan


def _size(unit: Unit) -> str:
    where = "" if unit.layer is None else f" of layer {unit.layer}"
    return f"{unit.category}{where} with {unit.parameters:,} parameters"


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def make_plan(
    shape: ModelShape,
    config: HFTConfig,
    *,
    default_seed: int,
    round: int = 0,
    scores: Mapping[str, float] | None = None,
) -> Plan:
    """Draw the plan of one round.

    ``default_seed`` (the run's ``--seed``) is used when ``--hft-seed`` is unset. ``scores`` (signal-to-noise ratio by
    unit name, of every attention and feed-forward matrix) are needed by ``--hft-selection spectrum`` alone. In a model
    with adapters these train in every round, and nothing else does. Raises ``UserError`` for patterns that don't fit
    the model, or when nothing would train.
    """
    if shape.adapters is not None:
        config = replace(config, hft_ratio=1.0)
    policy = Policy.from_config(config, default_seed=default_seed)
    assert scores is not None or not SELECTIONS[policy.selection].needs_scores, f"{policy.selection} ranks by scores"
    units = units_of(shape)
    if shape.adapters is not None:
        training = frozenset(unit.name for unit in units if unit.category == "adapter")
        return Plan(policy=policy, round=round, units=units, training=training)
    training = training_units(units, policy=policy, round=round, scores=scores or {})
    return Plan(policy=policy, round=round, units=units, training=training)
