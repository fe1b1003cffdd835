"""Rotary positions: one table of cosines and sines per micro-batch, and Llama-3's scaling from config.json."""

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from hft_megatron.config.model_shape import Llama3RopeScaling, ModelShape
from hft_megatron.model.torch_attention import PackedSegments


class RotaryTable(RotaryEmbedding):
    """Stands in the place of ``GPTModel``'s rotary embedding, and gives cosines and sines instead of angles.

    megatron-core computes them from the angles again in every layer, for queries and for keys; of a packed sequence it
    reads the lengths back from the device each time, which waits for all work queued on it.
    """

    def __init__(self, shape: ModelShape, dtype: torch.dtype) -> None:
        super().__init__(shape.kv_channels, rotary_percent=1.0, rotary_base=shape.rotary_base)
        self.dtype = dtype
        if shape.rope_scaling is not None:
            # megatron-core's own scaling takes the factor alone and fixes low, high and original length.
            self.inv_freq: Tensor = scaled_inverse_frequencies(self.inv_freq, shape.rope_scaling)

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: PackedSegments | None = None,
    ) -> Any:
        """What ``GPTModel`` then hands to ``forward``: a length, or the positions of a packed sequence."""
        if packed_seq_params is not None:
            return packed_seq_params.positions
        return super().get_rotary_seq_len(inference_context, transformer, transformer_input, transformer_config)

    def forward(self, positions: int | Tensor, **of_the_engine: Any) -> Tensor:
        """A length s, or positions (s,) -> cosines and sines (2, s, 1, 1, d), in the model's dtype.

        The first half of the sines is negated, as ``rotate`` needs them.
        """
        if isinstance(positions, int):
            angles = self.get_freqs_non_repeated(positions)
        else:
            angles = torch.outer(positions.to(self.inv_freq.dtype), self.inv_freq)
        cos, sin = angles.cos(), angles.sin()
        table: Tensor = torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])
        return table[:, :, None, None].to(self.dtype)


class _Rotation(torch.autograd.Function):
    """(s, b, heads, d) and a table (2, s, 1, 1, d) -> (s, b, heads, d). Keeps the table alone."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        cos, sin = table
        turned: Tensor = (heads * cos).add_(_halves_swapped(heads).mul_(sin))
        return turned

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        cos, sin = table
        back: Tensor = (gradient * cos).sub_(_halves_swapped(gradient).mul_(sin))  # a turn by the negative angle
        return back, None


def _halves_swapped(heads: Tensor) -> Tensor:
    swapped: Tensor = heads.roll(heads.size(-1) // 2, dims=-1)
    return swapped


def rotate(heads: Tensor, table: Tensor) -> Tensor:
    """Turns every pair (x_i, x_(i + d/2)) of (s, b, heads, d) by its position's angles, rounded as in Hugging Face."""
    rotated: Tensor = _Rotation.apply(heads, table)
    return rotated


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
