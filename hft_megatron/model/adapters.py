"""Low-rank adapters beside column- and row-parallel matrices: W x + alpha / r x B A x (Hu et al., arXiv 2106.09685).

An A has its matrix's columns and a B its rows, so one of the two is cut over tensor-parallel ranks as the matrix is and
every rank holds the other whole. The A of a column-parallel matrix is one more matrix over the shared input, which is
gathered once for all of them; for a row-parallel one, B A x of this rank's columns is added before the sum over ranks,
which is then one sum for both. A whole factor has a part of its gradient on each rank, which
``optimizer.whole_gradients`` adds up once in a step.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

from hft_megatron.config.adapters import ADAPTER_PARTS, Adapters
from hft_megatron.model.linear import RowParallel, SharedInputColumnParallel, product
from hft_megatron.parallel.groups import Placement

PARTIAL_MARK = "gradient_is_partial"
"""Attribute of a parameter that all tensor-parallel ranks hold, and of whose gradient each has a part."""


class _Factor(torch.nn.Module):
    """An A or a B, called by its user because of --overlap-param-gather (see ``linear._Member``)."""

    def __init__(self, rows: int, columns: int, like: Tensor, *, is_whole: bool) -> None:
        super().__init__()
        self.weight = Parameter(torch.empty(rows, columns, dtype=like.dtype, device=like.device))
        setattr(self.weight, PARTIAL_MARK, is_whole)

    def forward(self) -> Parameter:
        return self.weight


class LowRank(torch.nn.Module):
    """The adapter of one matrix, of which this rank holds ``weight`` (rows, columns)."""

    def __init__(self, weight: Tensor, adapters: Adapters, *, cut: int, tensor_rank: int) -> None:
        """``cut`` is the dimension of the matrix that is cut over tensor-parallel ranks."""
        super().__init__()
        rows, columns = weight.shape
        self.lora_A = _Factor(adapters.rank, columns, weight, is_whole=cut == 0)
        self.lora_B = _Factor(rows, adapters.rank, weight, is_whole=cut == 1)
        self.scale, self.probability, self.is_on = adapters.scale, adapters.dropout, True
        self._cut = cut
        # All ranks drop the same entries of one input, and each its own of different columns.
        self._salt = tensor_rank if cut == 1 else 0

    @property
    def drops(self) -> bool:
        """True if a forward pass drops some of the input now."""
        return self.training and self.probability > 0

    def dropped(self, hidden: Tensor) -> Tensor:
        """(s, b, columns) -> the same, with the share ``dropout`` of the entries dropped in training.

        The draw begins at torch's generator of the host, which recomputed layers restore.
        """
        if not self.drops:
            return hidden
        seed = int(torch.randint(2**62, ())) + self._salt
        generator = torch.Generator(hidden.device).manual_seed(seed)
        # A mask that includes the scale would be rounded to the data type, which is a bias in bf16.
        kept = torch.empty_like(hidden, dtype=torch.bool).bernoulli_(1 - self.probability, generator=generator)
        return (hidden * kept).mul_(1 / (1 - self.probability))

    def added(self, output: Tensor, inner: Tensor) -> Tensor:
        """The matrix's output (s, b, rows), and A x (s, b, rank) -> their sum with the adapter's."""
        return torch.add(output, product(inner, self.lora_B()), alpha=self.scale)

    def sharded_state_dict(
        self, prefix: str, sharded_offsets: Any, metadata: Any, tp_group: torch.distributed.ProcessGroup
    ) -> dict[str, Any]:
        """Description for dist_checkpointing, under the names of the parameters."""
        cut = ADAPTER_PARTS[1 - self._cut]
        described: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {f"{cut}.weight": self._cut},
            sharded_offsets,
            tp_group=tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return described


def add_adapters(layers: Iterable[torch.nn.Module], adapters: Adapters, tensor_rank: int) -> None:
    """Puts adapters beside the matrices of a chunk's layers, with uninitialised weights."""
    of_rows = {"linear_proj": "o_proj", "linear_fc2": "down_proj"}
    for layer in layers:
        for path, module in list(layer.named_modules()):
            name = path.rpartition(".")[2]
            if isinstance(module, SharedInputColumnParallel):
                for member in set(module.member_names) & set(adapters.targets):
                    column = getattr(module, member)
                    column.adapter = LowRank(column.weight, adapters, cut=0, tensor_rank=tensor_rank)
                    column.is_adapted = module.is_adapted = True
            elif isinstance(module, RowParallel) and of_rows[name] in adapters.targets:
                module.adapter = LowRank(module.weight, adapters, cut=1, tensor_rank=tensor_rank)
                module.is_adapted = True


def seed_dropout(adapters: Adapters | None, *, seed: int, iteration: int, placement: Placement) -> None:
    """Makes the draws of one step's dropout depend on the run's seed, the iteration and the rank's place alone, so that
    a resumed run draws what it would have drawn; tensor-parallel ranks begin alike."""
    if adapters is None or adapters.dropout == 0:
        return
    words = f"dropout|{seed}|{iteration}|{placement.data_rank}|{placement.pipeline_rank}"
    digest = hashlib.sha256(words.encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


@contextlib.contextmanager
def adapters_off(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Disables the adapters: within it a model computes what it would without them."""
    found = [module for chunk in chunks for module in chunk.modules() if isinstance(module, LowRank)]
    for adapter in found:
        adapter.is_on = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.is_on = True
