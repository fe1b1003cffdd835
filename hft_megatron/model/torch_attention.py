"""Causal attention by torch's kernels, also where one sequence holds several examples that see only themselves."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@cache
def varlen_kernel() -> Callable[..., Any] | None:
    """torch's ``varlen_attn`` where it can be causal; imported only on request, because it brings torch's compiler
    with it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    return varlen_attn if has_causal_window(varlen_attn) else None


def has_causal_window(function: Callable[..., Any]) -> bool:
    """True if a ``varlen_attn`` can be causal by ``window_size``, as from torch 2.11 on."""
    return "window_size" in inspect.signature(function).parameters


@dataclass(kw_only=True)
class PackedSegments(PackedSeqParams):
    """megatron-core's description of a packed sequence, with further facts about its segments, so that the device need
    not be asked for them."""

    lengths: tuple[int, ...]
    """Lengths of the segments, on the host."""
    positions: Tensor
    """(tokens,) on the device: each token's place in its segment."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Query (t, heads / tp, d), key and value (t, groups / tp, d) of a layer -> (t, heads / tp, d); each segment
        sees itself alone."""
        return packed_attention(query, key, value, self, scale)


class TorchAttention(MegatronModule):
    """Causal attention by torch's own kernels: no score matrix is materialised.

    forward: query (s, b, heads / tp, d), key and value (s, b, groups / tp, d) -> (s, b, heads / tp x d); packed, the
    same without b, where each example sees only itself.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        assert attn_mask_type is AttnMaskType.causal
        assert config.context_parallel_size == 1
        self.softmax_scale = softmax_scale
        self.layer_number = layer_number

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, PackedSegments)
            return packed_seq_params.attend(self.layer_number, query, key, value, self.softmax_scale).flatten(1)
        # Padding is on the right, where a causal mask already hides it from every real token.
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = causal_attention(q, k, v, self.softmax_scale)
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)


def packed_seq_params(cu_seqlens: Tensor, device: torch.device) -> PackedSegments:
    """Describes segments that begin at ``cu_seqlens``, int32 of shape (segments + 1,) on the host."""
    lengths = cu_seqlens.diff()
    positions = torch.arange(int(cu_seqlens[-1])) - cu_seqlens[:-1].repeat_interleave(lengths)
    on_device = cu_seqlens.to(device, non_blocking=True)
    longest = int(lengths.max())
    return PackedSegments(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=tuple(lengths.tolist()),
        positions=positions.to(device, non_blocking=True),
    )


def packed_attention(query: Tensor, key: Tensor, value: Tensor, params: PackedSegments, scale: float | None) -> Tensor:
    """Query (t, heads, d), key and value (t, groups, d) -> (t, heads, d).

    Uses torch's variable-length flash kernel where there is one (CUDA, half precision), else computes example by
    example, without scores between examples and without a mask in memory.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        function = varlen_kernel()
        if function is not None:
            return by_varlen_kernel(function, query, key, value, params, scale)
    examples = zip(*(t.split(params.lengths) for t in (query, key, value)), strict=True)
    return torch.cat([_one_example(q, k, v, scale) for q, k, v in examples])


def by_varlen_kernel(
    function: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, params: PackedSegments, scale: float | None
) -> Tensor:
    """``packed_attention`` by a ``varlen_attn`` that has a causal window."""
    groups: dict[str, bool] = {}
    if query.size(1) != key.size(1):
        if "enable_gqa" in inspect.signature(function).parameters:
            groups = {"enable_gqa": True}
        else:  # torch 2.11: undocumented whether its kernel takes groups
            key, value = (t.repeat_interleave(query.size(1) // t.size(1), dim=1) for t in (key, value))
    causal = (-1, 0)
    starts, longest = params.cu_seqlens_q, params.max_seqlen_q
    out = function(query, key, value, starts, starts, longest, longest, scale=scale, window_size=causal, **groups)
    assert isinstance(out, Tensor)
    return out


def _one_example(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """(s, heads, d), (s, groups, d) twice -> (s, heads, d)."""
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    return causal_attention(q, k, v, scale).squeeze(0).transpose(0, 1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Torch's scaled dot product (flash kernels on GPU) without a score matrix in memory.

    (b, heads, s, d), (b, groups, s, d) twice -> (b, heads, s, d).
    """
    grouped = q.size(1) != k.size(1)
    if grouped and q.is_cuda and q.dtype == torch.float32:
        # Here only the flash and the math kernel take groups, flash refuses fp32, and math materialises scores.
        k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
