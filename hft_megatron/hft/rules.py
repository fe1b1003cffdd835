"""The selection rules: which units train in a round, given the policy and its randomness."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, combinations

from hft_megatron.config.names import SELECTIONS, Selection, SelectionName, add
from hft_megatron.hft.policy import Draw, Policy, nearest
from hft_megatron.hft.units import LAYER_CATEGORIES, MATRIX_CATEGORIES, Category, Unit


class SelectionRule(ABC):
    """One way to select. Rules hold no state and read neither rotation nor overrides from the policy."""

    @abstractmethod
    def select(
        self, units: Sequence[Unit], *, policy: Policy, draw: Draw, scores: Mapping[str, float]
    ) -> frozenset[str]:
        """The names of the units that train in ``draw.round``. ``scores`` (unit name to score) are for rules that
        rank."""

    def cycle(self, units: Sequence[Unit], ratio: Fraction) -> int | None:
        """Rounds between changes of the learning rate; None where it changes with every iteration."""
        return None


RULES: dict[str, SelectionRule] = {}
"""Every selection rule, by ``Policy.rule``: the level for random draws, else the selection."""


def register(name: str, rule: SelectionRule, selection: Selection | None = None) -> None:
    """Adds a rule under its name, which is then a value of --hft-selection.

    ``selection`` has the properties that options and rounds need; None for a level of random draws.
    """
    RULES[name] = rule
    if selection is not None:
        SELECTIONS[name] = selection
        add(SelectionName, name)


@dataclass(frozen=True, kw_only=True)
class _Quota:
    """Amount of one category that each layer trains, in matrices or in parameters."""

    low: int
    high: int
    layers_with_high: int
    """Number of layers that train ``high``; the others train ``low``."""


class CategoryRule(SelectionRule):
    """The same share of every category, spread as evenly over the layers as counting allows.

    Source: Hui et al., arXiv 2404.18466, for one half; other ratios, and whatever cannot be divided, are rounded so
    that the totals over all layers come closest.
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


class LayerRule(SelectionRule):
    """floor(ratio x layers + 1/2) whole layers, and all units outside the layers.

    Sources: the level "layer" of the method's ablation (Hui et al., arXiv 2404.18466). LISA (Pan et al., arXiv
    2403.17919) trains embedding, head and a few random layers, redrawn in every round, which is this rule under
    independent rotation.
    """

    def select(
        self, units: Sequence[Unit], *, policy: Policy, draw: Draw, scores: Mapping[str, float]
    ) -> frozenset[str]:
        """All units of the drawn layers and all units outside the layers."""
        layers = {str(unit.layer) for unit in units if unit.layer is not None}
        chosen = draw.choose(layers, nearest(policy.exact_ratio * len(layers)), purpose="layers")
        return frozenset(unit.name for unit in units if unit.layer is None or str(unit.layer) in chosen)


class ModelRule(SelectionRule):
    """floor(ratio x matrices + 1/2) of all attention and feed-forward matrices, norms by the same ratio of their own,
    and all units outside the layers.

    Source: the level "model" of the method's ablation (Hui et al., arXiv 2404.18466), which leaves open how to count.
    By parameters, the shuffled matrices train up to the place where their share is closest to the ratio (the later
    place where two are equally close).
    """

    def select(
        self, units: Sequence[Unit], *, policy: Policy, draw: Draw, scores: Mapping[str, float]
    ) -> frozenset[str]:
        """The drawn matrices and norms and all units outside the layers."""
        inside = [unit for unit in units if unit.layer is not None]
        training = {unit.name for unit in units if unit.layer is None}
        for purpose, members in (
            ("matrices", [unit for unit in inside if unit.category != "norm"]),
            ("norms", [unit for unit in inside if unit.category == "norm"]),
        ):
            sizes = {unit.name: unit.parameters for unit in members}
            order = draw.shuffle(sizes, purpose=purpose)
            if policy.counting == "matrices":
                count = nearest(policy.exact_ratio * len(order))
            else:
                count = _closest_prefix([sizes[name] for name in order], policy.exact_ratio)
            training.update(order[:count])
        return frozenset(training)


def _closest_prefix(sizes: Sequence[int], ratio: Fraction) -> int:
    """Number of leading ``sizes`` whose sum is closest to ``ratio`` of all."""
    sums = [0, *accumulate(sizes)]
    return min(range(len(sums)), key=lambda count: (abs(sums[count] - ratio * sums[-1]), -count))


class HiftRule(SelectionRule):
    """Round r trains group r mod groups of the blocks embedding | layer 0 | ... | last layer | final norm and head.

    Source: HiFT (Liu et al., arXiv 2401.15207), bottom-up order. A group has max(1, floor(ratio x blocks + 1/2))
    blocks, the last group the remaining ones. A tied head trains with the embedding, being one unit.
    """

    def select(
        self, units: Sequence[Unit], *, policy: Policy, draw: Draw, scores: Mapping[str, float]
    ) -> frozenset[str]:
        """All units of the round's group of blocks, and nothing else."""
        blocks = _blocks(units)
        size = _group_size(len(blocks), policy.exact_ratio)
        first = draw.round % _groups(len(blocks), size) * size
        return frozenset(name for block in blocks[first : first + size] for name in block)

    def cycle(self, units: Sequence[Unit], ratio: Fraction) -> int:
        """Rounds of one full cycle, after which every block has trained once and the learning rate changes."""
        blocks = len(_blocks(units))
        return _groups(blocks, _group_size(blocks, ratio))


def _blocks(units: Sequence[Unit]) -> list[list[str]]:
    """Unit names of every block, from the bottom up."""
    num_layers = 1 + max(unit.layer for unit in units if unit.layer is not None)
    blocks: list[list[str]] = [[] for _ in range(num_layers + 2)]
    for unit in units:
        place = unit.layer + 1 if unit.layer is not None else 0 if unit.category == "embedding" else -1
        blocks[place].append(unit.name)
    return blocks


def _group_size(blocks: int, ratio: Fraction) -> int:
    return max(1, nearest(ratio * blocks))


def _groups(blocks: int, size: int) -> int:
    return -(-blocks // size)


class SpectrumRule(SelectionRule):
    """Per category the floor(ratio x matrices + 1/2) of the highest score over all layers, ties to the lower layer;
    one norm of two as in ``CategoryRule``, and all units outside the layers.

    Source: Hartford et al., "Spectrum", arXiv 2406.06623, which ranks within every type of matrix; ranking within
    attention and feed-forward is ours, so that the totals are those of the other rules. The scores are computed once,
    so every round selects the same and only complementary rotation changes anything.
    """

    def select(
        self, units: Sequence[Unit], *, policy: Policy, draw: Draw, scores: Mapping[str, float]
    ) -> frozenset[str]:
        """The ranked matrices, the norms drawn for round 0 and all units outside the layers."""
        training = {unit.name for unit in units if unit.layer is None}
        for category in MATRIX_CATEGORIES:
            names = [unit.name for unit in units if unit.category == category]
            # sorted() is stable, so equal scores stay in canonical order.
            ranked = sorted(names, key=lambda name: -scores[name])
            training.update(ranked[: nearest(policy.exact_ratio * len(names))])
        return frozenset(training) | draw_category(units, category="norm", policy=policy, draw=replace(draw, round=0))


SELECTIONS["random"] = Selection()
add(SelectionName, "random")
register("category", CategoryRule())
register("layer", LayerRule())
register("model", ModelRule())
register(
    "spectrum",
    SpectrumRule(),
    Selection(
        what="ranks the matrices of every category",
        without=("hft_level", "hft_counting", "hft_pairing"),
        needs_scores=True,
    ),
)
register(
    "lisa",
    LayerRule(),
    Selection(
        what="redraws whole layers in every round",
        without=("hft_level", "hft_counting", "hft_pairing", "hft_rotation"),
        is_of_rounds=True,
    ),
)
register(
    "hift",
    HiftRule(),
    Selection(
        what="takes one group of layers after the other",
        without=("hft_level", "hft_counting", "hft_pairing", "hft_rotation"),
        is_of_rounds=True,
    ),
)
