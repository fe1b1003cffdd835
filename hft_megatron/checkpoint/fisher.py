"""The diagonal Fisher information of tasks and the weights that it was measured at, in a folder beside checkpoints.

By unit, as tensors of the whole model, so that any layout reads files of another. Every file has its digest, as in a
checkpoint.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from hft_megatron.checkpoint.folders import DIGESTS_FILE, UNFINISHED, damage_in, read_digests, write_digests
from hft_megatron.checkpoint.store import METADATA, State, described_slots, described_weights, flattened, like_weight
from hft_megatron.checkpoint.verification import share_of_files
from hft_megatron.checkpoint.writer import write_and_wait
from hft_megatron.checkpoint.writing import reason_of, request_save
from hft_megatron.engine.lines import refuse_if_unreadable
from hft_megatron.errors import RunFailed, UserError
from hft_megatron.optimizer.carried import keepers
from hft_megatron.optimizer.wrapping import WrappedModel
from hft_megatron.parallel.consensus import gathered, on_rank_0
from hft_megatron.parallel.groups import Placement

FACTS_FILE = "fisher.json"
FISHER, ANCHOR = "fisher", "anchor"
"""Names of a unit's tensors: the sum of its Fisher information over tasks, and its weights after the last of them."""

_UNITS = "units"
"""Key of the units, beside dist_checkpointing's own entries."""


@dataclass(frozen=True, kw_only=True)
class FisherFacts:
    """Description of the folder's contents."""

    iteration: int
    """Iteration of the task's run at which its last weights were reached."""
    batches: int
    """Batches over which the task's squared gradients were averaged."""
    tasks: int
    """Number of tasks whose Fisher information is summed."""


def read_facts(folder: Path) -> FisherFacts | None:
    """The facts of a complete folder, None where it isn't one; UserError where they cannot be read."""
    if not (folder / DIGESTS_FILE).exists():
        return None
    file = folder / FACTS_FILE
    try:
        return FisherFacts(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy the folder {folder.parent} again.") from error


def check_fisher(folder: Path, placement: Placement) -> None:
    """Raises UserError on every rank unless every file is as it was saved; collective, ranks share the reading."""
    for damage in gathered(_damage_found_here(folder, placement)):
        if damage is not None:
            raise UserError(f"{damage}; copy the folder {folder.parent} again, or train that task again.")
    refuse_if_unreadable(folder, read_digests(folder))


def _damage_found_here(folder: Path, placement: Placement) -> str | None:
    try:
        digests = read_digests(folder)
    except (OSError, ValueError) as error:
        return f"{folder / DIGESTS_FILE} cannot be read ({error})"
    return damage_in(folder, digests, share_of_files(digests, placement))


def read_fisher(
    folder: Path, wrapped: WrappedModel, names: Sequence[str], placement: Placement
) -> dict[str, dict[str, Tensor]]:
    """unit -> name -> (elements,) fp32 of the trainable units that this rank keeps, in host memory.

    ``names`` are ``FISHER``, ``ANCHOR`` or both. Every rank must call it.
    """
    by_unit = keepers_of(wrapped, placement)
    # Rows that pad the vocabulary may be fewer in the file: zeros there hold nothing.
    wanted: State = {
        slot.unit: {name: like_weight(model, name, torch.zeros(slot.parameter.numel())) for name in names}
        for slot, model in described_slots(wrapped, described_weights(wrapped.modules))
        if wrapped.plan.trains(slot.unit) and by_unit[slot.unit] == placement.data_rank
    }
    loaded = dist_checkpointing.load({_UNITS: wanted}, str(folder))
    # Absent on a rank that keeps nothing: dist_checkpointing drops empty dictionaries.
    return flattened(loaded.get(_UNITS, {}))


def keepers_of(wrapped: WrappedModel, placement: Placement) -> dict[str, int]:
    """Data-parallel rank that reads and writes each unit."""
    slots = [slot for slot, _ in described_slots(wrapped, described_weights(wrapped.modules))]
    return keepers(slots, placement.groups.dp)


def write_fisher(
    folder: Path, wrapped: WrappedModel, fisher: Mapping[str, Tensor], facts: FisherFacts, placement: Placement
) -> None:
    """Writes ``fisher``, (elements,) fp32 of the units that this rank keeps, with the model's weights, which must be
    gathered. Replaces the folder's contents once everything is written. Every rank must call it.

    Raises RunFailed on all ranks where one cannot write.
    """
    unfinished = folder.with_name(folder.name + UNFINISHED)

    def begin() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        (unfinished / FACTS_FILE).write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")

    def complete() -> None:
        report.raise_failure()
        write_digests(unfinished, {name: digest for one in digests for name, digest in one.items()})
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)

    _on_first_rank(folder, begin)
    request, report = request_save(_described(wrapped, fisher, placement), unfinished, dict(METADATA))
    _on_first_rank(folder, report.raise_failure)
    failures: Mapping[int, Any] = {}
    try:
        request._replace(async_fn=partial(write_and_wait, request.async_fn)).execute_sync()
    except CheckpointException as error:  # on every rank, but only rank 0 has the reasons
        failures = error.failures
    _on_first_rank(folder, partial(_raise_any, failures))
    digests = gathered(report.digests)
    _on_first_rank(folder, complete)


def _described(wrapped: WrappedModel, fisher: Mapping[str, Tensor], placement: Placement) -> State:
    by_unit = keepers_of(wrapped, placement)
    found: State = {}
    for slot, model in described_slots(wrapped, described_weights(wrapped.modules)):
        *outer, _ = model.replica_id
        # A unit that another tensor or pipeline rank holds as well is written there.
        if by_unit[slot.unit] == placement.data_rank and not any(outer):
            kept = {FISHER: fisher[slot.unit], ANCHOR: slot.parameter.detach().view(-1)}
            found[slot.unit] = {name: like_weight(model, name, flat) for name, flat in kept.items()}
    return found


def _raise_any(failures: Mapping[int, Any]) -> None:
    if failures:
        raise OSError(reason_of(failures))


def _on_first_rank(folder: Path, act: Callable[[], None]) -> None:
    """Calls ``act`` on rank 0; RunFailed on all ranks where it fails."""

    def act_or_say() -> None:
        try:
            act()
        except OSError as error:
            raise RunFailed(f"the Fisher information of this task cannot be written to {folder}: {error}.") from error

    on_rank_0(act_or_say)
