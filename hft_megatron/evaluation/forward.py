"""A forward pass of sequences through the stages of a model that is not being trained.

Sequences follow each other without padding between them, as in a packed batch of training: lengths may differ, and
sequence parallelism only needs their sum to be a multiple of the tensor ranks.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hft_megatron.engine import cpu_backend
from hft_megatron.model.kv_cache import KeyValueCache, first_tokens, next_tokens
from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.readout import Readout
from hft_megatron.model.torch_attention import PackedSegments
from hft_megatron.parallel.groups import Placement


def is_speaker(placement: Placement) -> bool:
    """True on the rank that passes on its replica's answers: the first tensor rank of the last stage."""
    return placement.pipeline_rank == placement.pipeline_size - 1 and placement.tensor_rank == 0


def free_memory(device: torch.device) -> None:
    """Frees unreferenced memory, so that another model can use it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True)
class ModelInPlace:
    """This rank's part of a model in its layout; collective over the ranks of one replica."""

    chunks: Sequence[LlamaModel]
    placement: Placement

    @property
    def window(self) -> int:
        """Maximum tokens of a sequence: the model's positions in config.json."""
        return self.chunks[0].shape.max_position_embeddings

    @property
    def readout(self) -> Readout:
        """The head; on the last stage."""
        return Readout(self.chunks[-1])

    def read(self, sequences: Sequence[Tensor], cache: KeyValueCache | None = None) -> Tensor | None:
        """Whole sequences, each (tokens,) int64 -> hidden states (all tokens, h) in their order; None off the last
        stage. Their keys and values go into ``cache``."""
        tokens = torch.cat(list(sequences))
        padding = -tokens.size(0) % self._multiple
        segments = first_tokens([len(one) for one in sequences], cache, padding, self.placement.device)
        return self._through_stages(tokens, segments, padding)

    def read_next(self, tokens: Tensor, cache: KeyValueCache) -> Tensor | None:
        """One more token (rows,) of every row of ``cache`` -> hidden states (rows, h); None off the last stage."""
        padding = -tokens.size(0) % self._multiple
        hidden = self._through_stages(tokens, next_tokens(cache, padding), padding)
        cache.advance()
        return hidden

    @property
    def _multiple(self) -> int:
        return self.placement.tensor_size if self.chunks[0].config.sequence_parallel else 1

    def _through_stages(self, tokens: Tensor, segments: PackedSegments, padding: int) -> Tensor | None:
        placement, config = self.placement, self.chunks[0].config
        group, size, rank = placement.groups.pp, placement.pipeline_size, placement.pipeline_rank
        tokens = torch.nn.functional.pad(tokens.to(placement.device), (0, padding))
        output: Tensor | None = None
        for chunk in self.chunks:
            if not chunk.pre_process:
                rows = tokens.size(0) // self._multiple
                incoming = torch.empty(
                    (rows, 1, config.hidden_size), dtype=config.params_dtype, device=placement.device
                )
                dist.recv(incoming, group=group, group_src=(rank - 1) % size)
                chunk.set_input_tensor(incoming)
            with cpu_backend.out_of_the_way():
                output = chunk.hidden_states(tokens, segments)
            chunk.set_input_tensor(None)
            if not chunk.post_process:
                dist.send(output.contiguous(), group=group, group_dst=(rank + 1) % size)
        if rank < size - 1:
            return None
        assert output is not None
        whole = self.readout.whole(output)
        return whole[: whole.size(0) - padding]
