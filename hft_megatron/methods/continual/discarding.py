"""Checkpoints of earlier tasks, deleted when nothing in the sequence needs them any more (--continual-discard)."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from hft_megatron.checkpoint.finished import discard_checkpoints
from hft_megatron.checkpoint.folders import chain_of, complete_checkpoints
from hft_megatron.config.run_folder import FISHER_FOLDER
from hft_megatron.errors import UserError


def discard(earlier: Sequence[Path], older: Sequence[Path], own: Path) -> list[str]:
    """Deletes the checkpoints of the tasks before one that is over; what was done, in lines for the log.

    ``earlier`` are the folders of their stages, in order; ``older`` those of them whose Fisher information
    (--ewc-lambda) is in that of the task before this one, and which goes, too; ``own`` is that of the stage that ended
    the task. What can't be deleted is tried again behind the next task.
    """
    try:
        # Of a task that was saved with --save-trained-only, which may have been given before and left out now.
        needed = {at.parent.resolve() for path in complete_checkpoints(str(own)) for at, _ in chain_of(path)}
    except UserError as error:
        return [f"> --continual-discard: nothing is deleted, because {error}"]
    lines = []
    for folder in earlier:
        if folder.resolve() in needed:
            lines.append(f"> --continual-discard: what is in {own} is based on {folder}, which stays")
            continue
        try:
            gone = discard_checkpoints(folder)
            if folder in older and (folder / FISHER_FOLDER).exists():
                shutil.rmtree(folder / FISHER_FOLDER)
        except OSError as error:
            lines.append(f"> --continual-discard: the checkpoints in {folder} could not be deleted: {error}")
            continue
        if gone:
            lines.append(f"> --continual-discard: deleted {len(gone)} checkpoints of {folder}, a task that is over")
    return lines
