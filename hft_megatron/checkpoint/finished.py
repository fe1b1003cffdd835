"""Last position of a run, also when its checkpoints have been deleted because nothing needs them any more."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from hft_megatron.checkpoint.folders import (
    DAMAGED,
    UNFINISHED,
    complete_checkpoints,
    delete_checkpoint,
    iteration_of,
)
from hft_megatron.checkpoint.position import TrainState
from hft_megatron.checkpoint.store import PLAN_FILE
from hft_megatron.config.run_folder import CHECKPOINT_TRACKER_FILE, FINISHED_FILE, sync, write_atomically
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Position of a run at its last checkpoint."""

    iteration: int
    round: int
    """The last round that trained, in the method's numbers."""


def reached(folder: Path) -> Reached | None:
    """Last position of the run in ``folder``; None where it has neither a checkpoint nor a record."""
    noted, complete = discarded(folder), complete_checkpoints(str(folder))
    if noted is not None or not complete:
        return noted
    return Reached(iteration=iteration_of(complete[0]), round=TrainState.read(complete[0]).round)


def discarded(folder: Path) -> Reached | None:
    """The record of a run whose checkpoints were deleted, maybe not all of them yet; None where there is none.

    UserError for a record that cannot be read.
    """
    file = folder / FINISHED_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return Reached(iteration=int(record["iteration"]), round=int(record["round"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--save: {file} cannot be read ({error}); copy the folder {folder} again.") from error


def discard_checkpoints(folder: Path) -> list[Path]:
    """Deletes a run's checkpoints, or those that an earlier call has left; returns the deleted paths.

    It first writes a record of the run's last position and the plan of its last round to the disk: a kill at any moment
    leaves the newest checkpoint or these. Raises OSError.
    """
    if discarded(folder) is None:
        last = reached(folder)
        if last is None:
            return []
        plan = complete_checkpoints(str(folder))[0] / PLAN_FILE
        write_atomically(folder / PLAN_FILE, plan.read_text(encoding="utf-8"))
        write_atomically(folder / FINISHED_FILE, json.dumps(asdict(last)) + "\n")
        sync(folder)
    # First, because it must not name a checkpoint that is gone.
    (folder / CHECKPOINT_TRACKER_FILE).unlink(missing_ok=True)
    gone = [path for path in sorted(folder.glob("iter_*")) if not path.name.endswith(DAMAGED)]
    for path in gone:
        if UNFINISHED in path.name:
            shutil.rmtree(path)
        else:
            delete_checkpoint(path)
    return gone
