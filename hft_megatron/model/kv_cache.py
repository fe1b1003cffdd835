"""Keys and values of the tokens that a batch of sequences has so far, so that generation computes each token once.

megatron-core has inference contexts for this. Between 0.16 and 0.19 they differ in what a layer passes them and in what
they need of the device, and both refuse the interleaved schedule, so they are not used. Here the cache travels with
the description of the packed sequence, which every layer passes unchanged to its core attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hft_megatron.model.torch_attention import PackedSegments, packed_attention, packed_seq_params


@dataclass(kw_only=True)
class KeyValueCache:
    """Keys and values of a batch for each layer of this rank, both (rows, groups / tp, room, d).

    A layer's memory is made with its first tokens.
    """

    room: int
    """Maximum number of tokens of a row."""
    lengths: Tensor
    """(rows,) int64 on the device: the tokens of each row, without those of the step that is being computed."""
    longest: int
    """The largest of ``lengths``, known without asking the device."""
    _layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def fill(self, layer: int, key: Tensor, value: Tensor, segments: Sequence[int]) -> None:
        """Takes the first tokens of every row: key and value (tokens, groups / tp, d), rows one after the other."""
        # Zeros, because masked entries are still multiplied by 0, and uninitialised memory may hold NaN.
        keys, values = (t.new_zeros((len(segments), t.size(1), self.room, t.size(2))) for t in (key, value))
        for whole, packed in ((keys, key), (values, value)):
            for row, part in enumerate(packed[: sum(segments)].split(list(segments))):
                whole[row, :, : part.size(0)] = part.transpose(0, 1)
        self._layers[layer] = keys, values

    def add(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Takes one more token of every row, both (rows, groups / tp, d); the keys and values up to the longest row."""
        keys, values = self._layers[layer]
        rows = torch.arange(key.size(0), device=key.device)
        keys[rows, :, self.lengths], values[rows, :, self.lengths] = key, value
        return keys[:, :, : self.longest + 1], values[:, :, : self.longest + 1]

    def advance(self) -> None:
        """Counts one more token for every row."""
        self.lengths = self.lengths + 1
        self.longest += 1

    def keep(self, rows: Sequence[int], longest: int) -> None:
        """Drops all rows but these, of which the longest has ``longest`` tokens."""
        index = torch.tensor(rows, device=self.lengths.device)
        self.lengths, self.longest = self.lengths[index], longest
        # One after the other, so that at most one layer is in memory twice.
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = keys[index], values[index]


@dataclass(kw_only=True)
class CachedSegments(PackedSegments):
    """Segments whose tokens go into a cache: all first tokens of its rows, or one more token of each."""

    cache: KeyValueCache
    rows: int
    """Segments that are rows of the cache; one after them is padding."""
    is_there: Tensor | None = None
    """Keys that one more token of each row sees: (rows, 1, 1, keys). None where whole sequences begin."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Query (t, heads / tp, d), key and value (t, groups / tp, d) of a layer -> (t, heads / tp, d)."""
        if self.is_there is None:
            self.cache.fill(layer, key, value, self.lengths[: self.rows])
            return packed_attention(query, key, value, self, scale)
        keys, values = self.cache.add(layer, key[: self.rows], value[: self.rows])
        groups = key.size(1)
        # The heads of a group read the same keys: as several queries, no key is repeated.
        grouped = query[: self.rows].unflatten(1, (groups, -1))
        found = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.is_there, scale=scale)
        answer = found.flatten(1, 2)
        padding = query.size(0) - self.rows
        return F.pad(answer, (0, 0, 0, 0, 0, padding)) if padding else answer


def first_tokens(
    lengths: Sequence[int], cache: KeyValueCache | None, padding: int, device: torch.device
) -> PackedSegments:
    """Describes whole sequences one after the other, then ``padding`` tokens; they go into ``cache`` if given."""
    starts = torch.tensor([0, *lengths, *([padding] if padding else [])], dtype=torch.int32).cumsum(
        0, dtype=torch.int32
    )
    segments = packed_seq_params(starts, device)
    if cache is None:
        return segments
    return CachedSegments(**vars(segments), cache=cache, rows=len(lengths))


def next_tokens(cache: KeyValueCache, padding: int) -> CachedSegments:
    """Describes one more token of every row of ``cache``, followed by ``padding`` tokens."""
    rows = cache.lengths.size(0)
    positions = F.pad(cache.lengths, (0, padding))
    is_there = torch.arange(cache.longest + 1, device=cache.lengths.device) <= cache.lengths[:, None]
    # The lengths of segments are for the kernels of whole sequences, which this step doesn't call.
    return CachedSegments(
        qkv_format="thd",
        lengths=(1,) * (rows + padding),
        positions=positions,
        cache=cache,
        rows=rows,
        is_there=is_there[:, None, None],
    )
