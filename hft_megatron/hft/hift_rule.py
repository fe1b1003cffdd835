"""HiFT: one group of neighbouring layers trains per round, group after group from the bottom, then again."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

from hft_megatron.hft.draw import Draw, nearest
from hft_megatron.hft.policy import Policy
from hft_megatron.hft.units import Unit


class HiftRule:
    """Round r trains group r mod groups of the blocks embedding | layer 0 | ... | last layer | final norm and head.

    Source: HiFT (Liu et al., arXiv 2401.15207), bottom-up order. A group has max(1, floor(ratio x blocks + 1/2))
    blocks, the last group what remains. A tied head trains with the embedding, being one unit.
    """

    def select(
        self, units: Sequence[Unit], *, policy: Policy, draw: Draw, scores: Mapping[str, float]
    ) -> frozenset[str]:
        """All units of the round's group of blocks, and nothing else."""
        blocks = _blocks(units)
        size = _group_size(len(blocks), policy.exact_ratio)
        first = draw.round % _groups(len(blocks), size) * size
        return frozenset(name for block in blocks[first : first + size] for name in block)


def hift_groups(units: Sequence[Unit], ratio: Fraction) -> int:
    """Rounds of one full cycle, after which every block has trained once and the learning rate moves."""
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
