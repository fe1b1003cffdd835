"""Scores for ``--hft-selection spectrum``: a matrix's singular values above its noise. Computed once per run.

No matrix is scored on two ranks: singular values differ in their last bits between machines and thread counts, and
ranks that rank differently would train different units.
"""

import heapq
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.errors import UserError
from hft_megatron.hft.units import MATRIX_CATEGORIES, Unit, units_of
from hft_megatron.parallel.consensus import together

_IQR_OF_NORMAL = 1.349
"""Interquartile range of a normal distribution, in standard deviations."""


def signal_to_noise(weight: Tensor) -> float:
    """Sum of the singular values above the noise threshold over the sum of those below, over the largest of them.

    ``weight`` is a whole matrix of shape [rows, columns], of any floating dtype, whose entries are finite. The
    threshold is Marchenko and Pastur's upper edge sigma x (1 + sqrt(beta)), with beta the shorter side over the longer
    one and sigma the interquartile range of the singular values / 1.349. Infinite when nothing is below the threshold,
    0 for a matrix of zeros. Source: Hartford et al., "Spectrum", arXiv 2406.06623.
    """
    values = torch.linalg.svdvals(weight.float())
    largest = values.max().item()
    if largest == 0:
        return 0.0
    upper, lower = torch.quantile(values, 0.75), torch.quantile(values, 0.25)
    beta = min(weight.shape) / max(weight.shape)
    is_signal = values > (upper - lower) / _IQR_OF_NORMAL * (1 + math.sqrt(beta))
    signal, noise = values[is_signal].sum().item(), values[~is_signal].sum().item()
    return math.inf if noise == 0 else signal / noise / largest


def spectrum_scores(shape: ModelShape, read: Callable[[str], Tensor], *, device: torch.device) -> dict[str, float]:
    """``signal_to_noise`` of every attention and feed-forward matrix, by unit name; the same on every rank.

    Collective over all ranks, each of which scores a share. ``read`` gets a tensor's Hugging Face name (ending in
    ``.weight``) and returns the whole matrix; it may raise UserError. Singular values are computed on ``device``.
    Raises the same UserError on every rank when a matrix cannot be read or holds entries that are not finite.
    """
    matrices = [unit for unit in units_of(shape) if unit.category in MATRIX_CATEGORIES]
    mine = _shares(matrices, dist.get_world_size())[dist.get_rank()]
    shares = together(lambda: {name: _score(name, read(f"{name}.weight").to(device)) for name in mine})
    scores = {name: score for share in shares for name, score in share.items()}
    assert scores.keys() == {unit.name for unit in matrices}, "every matrix is scored by one rank"
    return scores


def _score(name: str, weight: Tensor) -> float:
    if not bool(torch.isfinite(weight).all()):
        raise UserError(
            f"--hft-selection spectrum: {name} in the --load-hf folder has infinite or undefined entries, and so no "
            "singular values; use weights that are finite."
        )
    return signal_to_noise(weight)


def _shares(units: Sequence[Unit], ranks: int) -> list[list[str]]:
    """Unit names per rank: the largest first, each to the rank that has the fewest parameters so far."""
    loads = [(0, rank) for rank in range(ranks)]
    shares: list[list[str]] = [[] for _ in range(ranks)]
    for unit in sorted(units, key=lambda unit: -unit.parameters):
        load, rank = heapq.heappop(loads)
        shares[rank].append(unit.name)
        heapq.heappush(loads, (load + unit.parameters, rank))
    return shares
