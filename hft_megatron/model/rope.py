"""Llama-3's scaling of rotary frequencies, with every number from config.json."""

import math

import torch
from torch import Tensor

from hft_megatron.config.model_shape import Llama3RopeScaling


def scaled_inverse_frequencies(inverse_frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Stretches low frequencies by ``factor``, keeps high ones, blends between. (d / 2,) -> (d / 2,), fp32.

    The rule of Llama 3.1: wavelengths beyond original / low_freq_factor are divided by the factor, those under
    original / high_freq_factor are left, and between them the two are mixed linearly in original / wavelength.
    """
    wavelengths = 2 * math.pi / inverse_frequencies
    original = scaling.original_max_position_embeddings
    blend = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    stretched = inverse_frequencies / scaling.factor
    mixed = (1 - blend) * stretched + blend * inverse_frequencies
    # Outside the band the exact values stand: the mix would round them.
    mixed = torch.where(blend == 0.0, stretched, mixed)
    return torch.where(blend == 1.0, inverse_frequencies, mixed)
