"""The parts of a LLaMA layer that megatron-core lacks: attention and MLP by category, and RMSNorm."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import Attention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hft_megatron.config.model_shape import Llama3RopeScaling, ModelShape
from hft_megatron.model.linear import RowParallel, SharedInputColumnParallel
from hft_megatron.model.torch_attention import PackedSegments


class RotaryTable(RotaryEmbedding):
    """Replaces ``GPTModel``'s rotary embedding, and gives cosines and sines instead of angles.

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
        """The value that ``GPTModel`` passes to ``forward``: a length, or the positions of a packed sequence."""
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
    # Outside the band the exact values are kept: the mix would round them.
    mixed = torch.where(blend == 0.0, stretched, mixed)
    return torch.where(blend == 1.0, inverse_frequencies, mixed)


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float, *, in_one_kernel: bool) -> Tensor:
    """(..., h) over its root mean square, times weight (h,).

    In one kernel the input and one number per token are kept for the backward pass, and a product in half precision is
    rounded once. Otherwise the norm is rounded to the input's dtype before it is multiplied by the weight, as in
    Hugging Face's LlamaRMSNorm, and the input is kept in fp32.
    """
    if in_one_kernel:
        return F.rms_norm(hidden_states, weight.shape, weight, eps)
    normed = F.rms_norm(hidden_states.float(), weight.shape, eps=eps)
    return weight * normed.to(hidden_states.dtype)


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, by one kernel on CUDA; on CPU with Hugging Face's roundings, see ``rms_norm``.

    megatron-core's ``WrappedTorchNorm`` refuses sequence parallelism. There each rank normalises its part of the
    sequence, so the weight's gradient is a partial sum: ``weight.sequence_parallel`` has megatron-core all-reduce it.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., h) -> (..., h)."""
        return rms_norm(hidden_states, self.weight, self.eps, in_one_kernel=hidden_states.is_cuda)


class CategorySelfAttention(Attention):
    """megatron-core's attention with q, k and v as parameters of their own, in Hugging Face's row order."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **of_newer_engines: Any,
    ) -> None:
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
            **of_newer_engines,
        )
        self.linear_qkv = SharedInputColumnParallel(
            config,
            input_size=config.hidden_size,
            rows={
                "q_proj": self.query_projection_size,
                "k_proj": self.kv_projection_size,
                "v_proj": self.kv_projection_size,
            },
            init_method=config.init_method,
            tp_group=self.pg_collection.tp,
        )
        # Read by the base class's forward pass; LLaMA doesn't normalise queries or keys.
        self.q_layernorm = self.k_layernorm = None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *, rotary_pos_emb: Tensor, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(s, b, h) -> (s, b, h) and no bias; ``rotary_pos_emb`` is ``RotaryTable``'s.

        The base class passes ``key_value_states``, which self-attention doesn't use, to
        ``get_query_key_value_tensors`` as they are, and rotates nothing where it gets no angles.
        """
        output: tuple[Tensor, Tensor | None] = super().forward(
            hidden_states, attention_mask, key_value_states=rotary_pos_emb, **others
        )
        return output

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(s, b, h) and the rotary table -> query (s, b, heads / tp, d), key and value (s, b, groups / tp, d), of which
        query and key are rotated."""
        q, k, v = self.linear_qkv(hidden_states)
        head = self.hidden_size_per_attention_head
        split = lambda t: t.view(*t.shape[:2], -1, head)  # noqa: E731
        return rotate(split(q), key_value_states), rotate(split(k), key_value_states), split(v)


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up``, all (s, b, ffn / tp). Keeps gate and up, and computes ``silu(gate)`` again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


class LlamaMLP(MegatronModule):
    """SwiGLU feed-forward block, ``down(silu(gate(x)) * up(x))``, with gate and up as parameters of their own."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        # megatron-core 0.16 passes the configuration alone.
        super().__init__(config)
        assert not is_mtp_layer
        tp_group = parallel_state.get_tensor_model_parallel_group()
        self.linear_fc1 = SharedInputColumnParallel(
            config,
            input_size=config.hidden_size,
            rows={"gate_proj": config.ffn_hidden_size, "up_proj": config.ffn_hidden_size},
            init_method=config.init_method,
            tp_group=tp_group,
        )
        self.linear_fc2 = RowParallel(
            config.ffn_hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_group=tp_group,
        )

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """(s, b, h) -> (s, b, h) and no bias."""
        gate, up = self.linear_fc1(hidden_states)
        output, _ = self.linear_fc2(_SwiGLU.apply(gate, up))
        return output, None
