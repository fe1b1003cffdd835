"""The reference's log-probabilities: from one pass before training, kept on disk, or from a forward pass in every step.

The log-probabilities of a batch's answers come from a table made before training (``precompute``), from a second
forward pass through the policy with its trained half put back (``shared``: the frozen half is the reference's own),
or from a second model (``model``).
"""

import contextlib
import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import Parameter

from hft_megatron.config.run_folder import sync
from hft_megatron.conversion.save import Announce
from hft_megatron.costs.flops import NO_EXTRA_WORK, ExtraWork
from hft_megatron.data.batches import StepBatch
from hft_megatron.errors import UserError
from hft_megatron.methods.dpo.objective import LOG_PROBS, log_prob_step
from hft_megatron.model.adapters import adapters_off
from hft_megatron.model.llama import LlamaModel
from hft_megatron.model.parameters import parameter_slots
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.parallel.consensus import gathered
from hft_megatron.parallel.groups import Placement
from hft_megatron.trainer.loop import Hook
from hft_megatron.trainer.method import forward_pass
from hft_megatron.trainer.run import Run

_TENSOR = "log_probs"
_NOTE = "hft_megatron"
"""The only entry of the file's metadata: safetensors writes several in any order."""


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """Everything that the numbers depend on."""

    model: str
    """Digest of the reference's weights."""
    data: str
    """Digest of the pairs: files, tokenizer, template and rules."""
    dtype: str
    """Data type of the weights, such as ``torch.float32``."""
    arithmetic: str
    """Other settings that change the numbers: layout, packing and engine in bf16; empty in fp32, which only rounds."""
    pairs: int

    def file_name(self, *, part: bool) -> str:
        """``part``: the file of an incomplete pass, which another run resumes."""
        words = json.dumps(asdict(self), sort_keys=True)
        return f"{hashlib.sha256(words.encode()).hexdigest()[:24]}{'.part' if part else ''}.safetensors"


def read_cache(folder: Path, key: CacheKey, *, part: bool) -> Tensor | str | None:
    """The log-probabilities, (pairs, 2) fp64; a message where the file is damaged; None without a file.

    With ``part`` those of the pairs that a pass had reached, and NaN for the others.
    Raises UserError for a file that belongs to another model or other data than its name says.
    """
    path = folder / key.file_name(part=part)
    try:
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            metadata, log_probs = file.metadata() or {}, file.get_tensor(_TENSOR)
            assert isinstance(log_probs, Tensor)
        note = json.loads(metadata[_NOTE])
        saved, damaged = dict(note["key"]), _sha256(log_probs) != note["sha256"]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        return f"{path} cannot be read ({' '.join(str(error).split())})"
    if damaged:
        return f"{path} is damaged: its contents are not what was written"
    for name, value in asdict(key).items():
        if saved.get(name) != value:
            raise UserError(
                f"--dpo-reference-cache {folder}: {path.name} was made for the {name} {_short(saved.get(name))}, but "
                f"this run's is {_short(value)}; delete the file, which has been renamed or copied over another."
            )
    return log_probs


def check_cache_can_be_written(folder: Path) -> None:
    """Makes the folder and a temporary file in it: a pass over all data must not be lost. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


def write_cache(folder: Path, key: CacheKey, log_probs: Tensor, *, part: bool) -> Path:
    """Writes (pairs, 2) fp64 atomically; the whole file replaces the partial one. Raises OSError."""
    note = json.dumps({"key": asdict(key), "sha256": _sha256(log_probs)})
    path = folder / key.file_name(part=part)
    folder.mkdir(parents=True, exist_ok=True)
    # Not the process id: in containers that share the folder they may be alike.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(save({_TENSOR: log_probs.contiguous()}, {_NOTE: note}))
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if not part:
        (folder / key.file_name(part=True)).unlink(missing_ok=True)
    return path


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) else value


_PROGRESS_LINES = 10
_PARTS = 100
"""Number of times that a pass saves its state, so that a stop loses at most a hundredth of it."""


class PrecomputedReference:
    """Looks log-probabilities up by the numbers of the pairs."""

    def __init__(self, table: Tensor) -> None:
        """``table`` (pairs, 2) fp64: those of training, then those of validation."""
        self._table = table

    @property
    def held_bytes(self) -> int:
        """See ``run.Reference``."""
        return _bytes_of([self._table])

    @property
    def extra_work(self) -> ExtraWork:
        """See ``run.Reference``."""
        return NO_EXTRA_WORK

    def attach(self, batch: StepBatch) -> None:
        """See ``run.Reference``."""
        for micro_batch in batch.micro_batches:
            micro_batch["reference"] = self._table[micro_batch["pairs"]]


Ask = Callable[[Sequence[LlamaModel], StepBatch], None]
"""Adds the output of chunks with a reference's weights to a batch's micro-batches; collective."""


def ask_log_probs(chunks: Sequence[LlamaModel], batch: StepBatch) -> None:
    """Adds the log-probabilities of preference pairs."""
    log_probs = reference_pass(chunks, batch)
    if not log_probs:
        return  # only the last stage makes a loss
    for micro_batch, found in zip(batch.micro_batches, log_probs, strict=True):
        micro_batch["reference"] = found


def _one_pass(adapted: bool) -> ExtraWork:
    """The work of a reference that is evaluated in every step."""
    return ExtraWork(adapted_passes=1) if adapted else ExtraWork(forward_passes=1)


class ModelReference:
    """Evaluates a second model of the same layout."""

    def __init__(self, chunks: Sequence[LlamaModel], ask: Ask = ask_log_probs, *, adapted: bool = False) -> None:
        """``adapted``: ``ask`` leaves its adapters on."""
        self._chunks, self._ask = chunks, ask
        self.extra_work = _one_pass(adapted)

    @property
    def held_bytes(self) -> int:
        """See ``run.Reference``."""
        return _bytes_of(weight for chunk in self._chunks for weight in chunk.parameters())

    def attach(self, batch: StepBatch) -> None:
        """See ``run.Reference``; collective."""
        self._ask(self._chunks, batch)

    def head_weight(self) -> Tensor:
        """The reference's head, (rows, h); on the last stage."""
        return self._chunks[-1].head_weight()


class SharedReference(Hook):
    """Evaluates the policy itself, with the units that have trained put back for the pass.

    Weights that have never trained are the reference's already, so only the trained share is in memory twice.
    """

    def __init__(
        self,
        chunks: Sequence[LlamaModel],
        trained: frozenset[str],
        ask: Ask = ask_log_probs,
        *,
        adapted: bool = False,
    ) -> None:
        """``chunks`` hold the reference's weights now; copies of the units ``trained`` in earlier rounds are kept.
        ``adapted``: adapters are units like others, and ``ask`` leaves them on; otherwise they are not kept."""
        self._chunks, self._ask, self._adapted = chunks, ask, adapted
        self.extra_work = _one_pass(adapted)
        self._kept: dict[Parameter, Tensor] = {}
        self._wrapped: WrappedModel | None = None
        self._keep(trained)

    def _keep(self, units: frozenset[str]) -> None:
        for slot in parameter_slots(self._chunks):
            if slot.unit in units and slot.parameter not in self._kept and (self._adapted or not slot.is_adapter):
                self._kept[slot.parameter] = slot.parameter.detach().clone()

    @property
    def held_bytes(self) -> int:
        """See ``run.Reference``."""
        return _bytes_of(self._kept.values())

    def at_round_start(self, run: Run) -> None:
        self._wrapped = run.wrapped
        self._keep(run.wrapped.plan.training)

    def attach(self, batch: StepBatch) -> None:
        """See ``run.Reference``; collective."""
        # Outside a round nothing trains, and validation finds the weights whole.
        gathered = contextlib.nullcontext() if self._wrapped is None else self._wrapped.gathered_parameters()
        with gathered, self._put_back():
            self._ask(self._chunks, batch)

    def head_weight(self) -> Tensor:
        """The reference's head, (rows, h), outside of a pass; on the last stage."""
        weight = self._chunks[-1].head_weight()
        return self._kept.get(weight, weight)

    @contextlib.contextmanager
    def _put_back(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchanges values and not tensors: parameters are views of buffers that gathers and optimizer use."""
        for parameter, kept in self._kept.items():
            held = parameter.clone()
            parameter.copy_(kept)
            kept.copy_(held)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def reference_pass(chunks: Sequence[LlamaModel], batch: StepBatch) -> list[Tensor]:
    """Log-probabilities (nats, fp64) of each micro-batch's answers, (pairs, 2); none off the last stage. Collective.

    Adapters are off for it: the reference of a model with adapters is that model without them.
    """
    with adapters_off(chunks):
        return [report[LOG_PROBS] for report in forward_pass(log_prob_step, chunks, batch)]


def log_prob_table(
    chunks: Sequence[LlamaModel],
    batches: Iterable[StepBatch],
    pairs: int,
    placement: Placement,
    announce: Announce,
    *,
    begun: Tensor | None,
    keep_part: Callable[[Tensor], object],
) -> Tensor:
    """One pass over ``batches``, which hold every pair: (pairs, 2) fp64 on every rank. Collective.

    If a pair is in more than one batch, the first batch's numbers count. Every hundredth of the way ``keep_part`` gets
    the table so far, NaN where a number is missing; ``begun`` is such a table of an interrupted pass.
    """
    table = torch.full((pairs, 2), torch.nan, dtype=torch.float64) if begun is None else begun.clone()
    is_there = ~table[:, 0].isnan()
    new: list[tuple[Tensor, Tensor]] = []
    speaks = placement.pipeline_rank == placement.pipeline_size - 1 and placement.tensor_rank == 0
    came, part, line = 0, max(1, pairs // _PARTS), max(1, pairs // _PROGRESS_LINES)

    def fill_and_say() -> None:
        before = int(is_there.sum())
        _fill(table, is_there, new, placement)
        if (now := int(is_there.sum())) // line > before // line:
            announce(f"  reference log-probabilities: {now} of {pairs} pairs")

    for batch in batches:
        numbers = torch.cat([micro_batch["pairs"] for micro_batch in batch.micro_batches])
        lacked = _on_all((~is_there[numbers]).sum() if speaks else torch.tensor(0), placement)
        if lacked == 0:
            continue
        log_probs = reference_pass(chunks, batch)
        if speaks:
            new.append((numbers, torch.cat(log_probs).cpu()))
        came += lacked
        if came >= part:
            fill_and_say()
            keep_part(table)
            new, came = [], 0
    fill_and_say()
    assert is_there.all(), "the batches hold every pair"
    return table


def _on_all(count: Tensor, placement: Placement) -> int:
    """The sum over ranks, which hold different numbers of pairs: a common decision must not depend on one rank."""
    total = count.to(device=placement.device, dtype=torch.int64)
    dist.all_reduce(total)
    return int(total)


def _fill(table: Tensor, is_there: Tensor, new: Sequence[tuple[Tensor, Tensor]], placement: Placement) -> None:
    """Adds the numbers of all ranks' batches since the last call to every rank's ``table``, the first of a pair."""
    everyone = gathered(new)
    # Batch by batch, in training's order of the pairs, and not rank by rank.
    in_turn = [found for batch in zip(*(part for part in everyone if part), strict=True) for found in batch]
    if not in_turn:
        return
    numbers, first = np.unique(torch.cat([found[0] for found in in_turn]).numpy(), return_index=True)
    values = torch.cat([found[1] for found in in_turn])[torch.from_numpy(first)]
    lacked = torch.from_numpy(numbers)[~is_there[numbers]]
    table[lacked] = values[~is_there[numbers]]
    is_there[lacked] = True
