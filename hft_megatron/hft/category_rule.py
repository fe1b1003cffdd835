"""The paper's rule: the same share of every category in every layer, by matrices or parameters, alone or in pairs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

from hft_megatron.hft.draw import Draw, nearest
from hft_megatron.hft.policy import Policy
from hft_megatron.hft.units import LAYER_CATEGORIES, Category, Unit


@dataclass(frozen=True, kw_only=True)
class _Quota:
    """How much of one category each layer trains, in matrices or in parameters."""

    low: int
    high: int
    layers_with_high: int
    """So many layers train ``high``, the others ``low``."""


class CategoryRule:
    """The same share of every category, spread as evenly over the layers as counting allows.

    Source: Hui et al., arXiv 2404.18466, for one half; other ratios, and whatever can't be divided, are rounded so that
    the totals over all layers come closest.
    """

    def select(
        self, units: Sequence[Unit], *, policy: Policy, draw: Draw, scores: Mapping[str, float]
    ) -> frozenset[str]:
        """Per category, the drawn units of every layer; all units outside the layers."""
        training = {unit.name for unit in units if unit.layer is None}
        for category in LAYER_CATEGORIES:
            training |= draw_category(units, category=category, policy=policy, draw=draw)
        return frozenset(training)


def draw_category(units: Sequence[Unit], *, category: Category, policy: Policy, draw: Draw) -> frozenset[str]:
    """The training units of one category: first which layers train the larger amount, then the units of each layer."""
    layers: list[list[Unit]] = [[] for _ in range(1 + max(unit.layer for unit in units if unit.layer is not None))]
    for unit in units:
        if unit.layer is not None and unit.category == category:
            layers[unit.layer].append(unit)
    if policy.counting == "matrices":
        quota = _quota_by_matrices(layers[0], len(layers), policy.exact_ratio)
    else:
        quota = _quota_by_parameters(layers[0], len(layers), policy.exact_ratio)
    paired = policy.pairing == "complementary"
    high = _pairwise_high(quota, len(layers), category, draw) if paired else _any_high(quota, layers, category, draw)
    training: set[str] = set()
    for index, layer in enumerate(layers):
        if paired and index % 2:
            training |= {unit.name for unit in layer} - _twins(layers[index - 1], layer, training)
            continue
        amount = quota.high if index in high else quota.low
        purpose = f"{category} units of layer {index}"
        if policy.counting == "matrices":
            training |= draw.choose((unit.name for unit in layer), amount, purpose=purpose)
        else:
            training |= _draw_subset(layer, amount, draw, purpose)
    return frozenset(training)


def _quota_by_matrices(layer: Sequence[Unit], num_layers: int, ratio: Fraction) -> _Quota:
    """floor(ratio x units x layers + 1/2) units in all; layers differ by at most one."""
    low, layers_with_high = divmod(nearest(ratio * len(layer) * num_layers), num_layers)
    return _Quota(low=low, high=low + 1, layers_with_high=layers_with_high)


def _quota_by_parameters(layer: Sequence[Unit], num_layers: int, ratio: Fraction) -> _Quota:
    """The amounts closest to the ratio. Where a smaller and a larger one are equally close (1 and 2 of 3 matrices at
    0.5), half of the layers train the larger one, an odd layer included."""
    target = ratio * _size(layer)
    amounts = {_size(subset) for subset in _subsets(layer)}
    distance = min(abs(amount - target) for amount in amounts)
    closest = sorted(amount for amount in amounts if abs(amount - target) == distance)
    assert len(closest) in (1, 2), closest
    layers_with_high = nearest(Fraction(num_layers, 2)) if len(closest) == 2 else 0
    return _Quota(low=closest[0], high=closest[-1], layers_with_high=layers_with_high)


def _any_high(quota: _Quota, layers: Sequence[object], category: Category, draw: Draw) -> set[int]:
    """Layers that train the larger amount: any of them."""
    chosen = draw.choose(map(str, range(len(layers))), quota.layers_with_high, purpose=f"{category} layers")
    return {int(layer) for layer in chosen}


def _pairwise_high(quota: _Quota, num_layers: int, category: Category, draw: Draw) -> set[int]:
    """Layers that train the larger amount: one of each pair, and the last layer where that completes the total."""
    if quota.layers_with_high == 0:
        return set()
    pairs = num_layers // 2
    high = set()
    for pair in range(pairs):
        (layer,) = draw.choose((str(2 * pair), str(2 * pair + 1)), 1, purpose=f"{category} layers of pair {pair}")
        high.add(int(layer))
    assert quota.layers_with_high - pairs == num_layers % 2, "complementary pairs need ratio 0.5"
    return high | ({num_layers - 1} if num_layers % 2 else set())


def _twins(layer: Sequence[Unit], next_layer: Sequence[Unit], training: set[str]) -> set[str]:
    """The units of ``next_layer`` at the places of those that train in ``layer``."""
    return {twin.name for unit, twin in zip(layer, next_layer, strict=True) if unit.name in training}


def _draw_subset(layer: Sequence[Unit], amount: int, draw: Draw, purpose: str) -> frozenset[str]:
    """One of the subsets of ``layer`` that hold ``amount`` parameters, all equally likely."""
    by_label = {
        "+".join(unit.name.rpartition(".")[2] for unit in subset): subset
        for subset in _subsets(layer)
        if _size(subset) == amount
    }
    (label,) = draw.choose(by_label, 1, purpose=purpose)
    return frozenset(unit.name for unit in by_label[label])


def _subsets(layer: Sequence[Unit]) -> Iterable[tuple[Unit, ...]]:
    for count in range(len(layer) + 1):
        yield from combinations(layer, count)


def _size(units: Iterable[Unit]) -> int:
    return sum(unit.parameters for unit in units)
