"""Causal attention by torch's kernels, also where one sequence holds several examples that see only themselves."""

import inspect

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None  # type: ignore[assignment]

_WINDOW_AND_GROUPS = {"window_size", "enable_gqa"}
"""Arguments that the first releases of ``varlen_attn`` lack."""
HAVE_VARLEN = varlen_attn is not None and inspect.signature(varlen_attn).parameters.keys() >= _WINDOW_AND_GROUPS


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
            return packed_attention(query, key, value, packed_seq_params, self.softmax_scale).flatten(1)
        # Padding stands on the right, where a causal mask already hides it from every real token.
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = causal_attention(q, k, v, self.softmax_scale)
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)


def packed_seq_params(cu_seqlens: Tensor, device: torch.device) -> PackedSeqParams:
    """What megatron-core needs to know of segments that begin at ``cu_seqlens``, int32 of shape (segments + 1,).

    With these, rotary positions restart in every segment. ``max_seqlen`` must be the longest segment's true length: a
    table of rotary angles as long as the whole sequence would be taken for that sequence's, and not restart.
    """
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    on_device = cu_seqlens.to(device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def packed_attention(query: Tensor, key: Tensor, value: Tensor, params: PackedSeqParams, scale: float | None) -> Tensor:
    """Query (t, heads, d), key and value (t, groups, d) -> (t, heads, d).

    By torch's variable-length flash kernel where it is there (CUDA, half precision); elsewhere example by example,
    which computes no scores between examples and needs no mask in memory.
    """
    cu_seqlens, longest = params.cu_seqlens_q, params.max_seqlen_q
    if HAVE_VARLEN and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        out = varlen_attn(
            query,
            key,
            value,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            scale=scale,
            window_size=(-1, 0),  # causal
            enable_gqa=query.size(1) != key.size(1),
        )
        assert isinstance(out, Tensor)
        return out
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    examples = zip(*(t.split(lengths) for t in (query, key, value)), strict=True)
    return torch.cat([_one_example(q, k, v, scale) for q, k, v in examples])


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
        # There only the flash and the math kernel know groups, flash refuses fp32, and math materialises scores.
        k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
