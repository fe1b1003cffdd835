"""Changes of each weight by training, and of weights that should be frozen: two models, unit by unit."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

from torch import Tensor

from hft_megatron.checkpoint.saved_run import SavedRun
from hft_megatron.checkpoint.tensors import CheckpointTensors
from hft_megatron.config.model_shape import HF_CONFIG_FILE, ModelShape, load_hf_config
from hft_megatron.conversion.adapter_folder import merged_reader
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.errors import UserError
from hft_megatron.hft.units import CATEGORIES, Category, units_of
from hft_megatron.model.parameter_names import whole_shape

_ELEMENTS_AT_ONCE = 1 << 24
"""Elements of both models' weights in double precision: 256 MB."""


@dataclass(frozen=True, kw_only=True)
class UnitWeights:
    """The weights of one model on disk."""

    name: str
    """Their name in messages."""
    shape: ModelShape
    read: Callable[[str], Tensor]
    """A unit's whole weight in Hugging Face's shape, in the data type that it is kept in."""


@contextmanager
def folder_weights(folder: str, *, option: str) -> Iterator[UnitWeights]:
    """The weights of a Hugging Face folder, which ``option`` names in messages. Raises UserError if unreadable."""
    name = f"{option} {folder}"
    shape = ModelShape.from_hf_config(load_hf_config(folder), source=f"{name}/{HF_CONFIG_FILE}")
    with HuggingFaceWeights(folder, option=option) as weights:

        def read(unit: str) -> Tensor:
            weights.check_shape(f"{unit}.weight", whole_shape(unit, shape))
            return weights.read(f"{unit}.weight")

        yield UnitWeights(name=name, shape=shape, read=read)


@contextmanager
def run_weights(run: SavedRun) -> Iterator[UnitWeights]:
    """The weights of a run's checkpoint, adapters added to their matrices. Raises UserError where it is damaged, or
    where the folder with the weights that it omits is missing or has changed."""
    tensors = CheckpointTensors(run.checkpoint, run.identity.shape, option=run.option)
    with tensors.on(run.source() if tensors.left_out else None) as read:
        shape = run.identity.shape
        yield UnitWeights(name=str(run.checkpoint), shape=shape.base, read=merged_reader(read, shape))


@dataclass(frozen=True, kw_only=True)
class Change:
    """Change of some weights from W0 to W."""

    parameters: int
    changed: int
    """Number of parameters whose value differs."""
    squared_change: float
    """Sum of (W - W0)^2."""
    squared_base: float
    """Sum of W0^2."""

    @property
    def relative(self) -> float:
        """||W - W0|| / ||W0||, Frobenius norms; infinite where W0 is zero and W is not."""
        if self.squared_base == 0:
            return math.inf if self.changed else 0.0
        return math.sqrt(self.squared_change / self.squared_base)

    @property
    def is_same(self) -> bool:
        """True if every parameter has kept its value."""
        return self.changed == 0


@dataclass(frozen=True, kw_only=True)
class UnitChange(Change):
    """The change of one unit."""

    unit: str
    category: Category
    layer: int | None
    """Index of the transformer layer; None outside the layers."""


@dataclass(frozen=True, kw_only=True)
class WeightChanges:
    """All units of a model, from the embedding to the head."""

    units: tuple[UnitChange, ...]

    @staticmethod
    def joined(shares: Sequence["WeightChanges"]) -> "WeightChanges":
        """The changes of a model from shares of it, in the order of its units; each share took every n-th unit."""
        in_turn = zip_longest(*(share.units for share in shares))
        return WeightChanges(units=tuple(unit for units in in_turn for unit in units if unit is not None))

    def by_category(self) -> dict[Category, Change]:
        """The weights of a category taken as one, for every category of the model."""
        return {
            category: _sum([unit for unit in self.units if unit.category == category])
            for category in CATEGORIES
            if any(unit.category == category for unit in self.units)
        }

    def whole(self) -> Change:
        """All weights taken as one."""
        return _sum(self.units)

    def changed_though_frozen(self, trained: frozenset[str]) -> tuple[str, ...]:
        """Units that have changed without being among ``trained``, the units that a run may have trained. In half
        fine-tuning no others may change: a unit named here was not frozen, or the base is another one."""
        return tuple(unit.unit for unit in self.units if not unit.is_same and unit.unit not in trained)


def _sum(changes: Sequence[Change]) -> Change:
    return Change(
        parameters=sum(change.parameters for change in changes),
        changed=sum(change.changed for change in changes),
        squared_change=math.fsum(change.squared_change for change in changes),
        squared_base=math.fsum(change.squared_base for change in changes),
    )


def weight_changes(base: UnitWeights, tuned: UnitWeights, share: slice = slice(None)) -> WeightChanges:
    """The change of every unit, or of a share of them, from ``base`` to ``tuned``, in double precision; one unit of
    each is in memory.

    The base's weights are first rounded to the data type of the tuned model's, as they are at the start of a run: where
    a bf16 run has frozen a unit of an fp32 folder, that unit has not changed. Raises UserError where the models differ
    in a unit or its shape.
    """
    check_alike((base.name, tuned.name), (base.shape, tuned.shape))
    changes = []
    for unit in units_of(tuned.shape)[share]:
        after = tuned.read(unit.name)
        before = base.read(unit.name).to(after.dtype)
        change = _change(before.flatten(), after.flatten())
        changes.append(UnitChange(**vars(change), unit=unit.name, category=unit.category, layer=unit.layer))
    return WeightChanges(units=tuple(changes))


def check_alike(names: tuple[str, str], of_models: tuple[ModelShape, ModelShape]) -> None:
    """Raises UserError unless a base and a tuned model have the same units, in the same shapes."""
    bases = [shape.base for shape in of_models]
    shapes = [{unit.name: list(whole_shape(unit.name, shape)) for unit in units_of(shape)} for shape in bases]
    for unit in shapes[0] | shapes[1]:
        first, second = (f"of shape {held[unit]}" if unit in held else "missing" for held in shapes)
        if first != second:
            raise UserError(
                f"{names[0]} and {names[1]} cannot be compared weight by weight: {unit} is {first} in the one and "
                f"{second} in the other; compare a model with the one that it was tuned from."
            )


def _change(before: Tensor, after: Tensor) -> Change:
    """Change between two weights of one data type, both (parameters,)."""
    changed, squared_change, squared_base = 0, 0.0, 0.0
    for old, new in zip(before.split(_ELEMENTS_AT_ONCE), after.split(_ELEMENTS_AT_ONCE), strict=True):
        changed += int((old != new).sum())
        wide = old.double()
        squared_base += float(wide.dot(wide))
        difference = new.double().sub_(wide)
        squared_change += float(difference.dot(difference))
    return Change(parameters=before.numel(), changed=changed, squared_change=squared_change, squared_base=squared_base)
