"""Whole layers, norms included: the layer level of the paper's ablation, and LISA, which redraws them every round."""

from collections.abc import Mapping, Sequence

from hft_megatron.hft.draw import Draw, nearest
from hft_megatron.hft.policy import Policy
from hft_megatron.hft.units import Unit


class LayerRule:
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
