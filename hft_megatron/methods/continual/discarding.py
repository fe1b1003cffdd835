"""Checkpoints of earlier tasks, deleted when nothing in the sequence needs them any more (--continual-discard)."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hft_megatron.checkpoint.finished import discard_checkpoints
from hft_megatron.checkpoint.folders import chain_of, complete_checkpoints
from hft_megatron.config.run_folder import FISHER_FOLDER
from hft_megatron.parallel.consensus import on_rank_0
from hft_megatron.trainer.loop import Hook
from hft_megatron.trainer.run import Run


@dataclass
class DiscardEarlier(Hook):
    """Deletes the checkpoints of the tasks before, when a task's last one and its row of the matrix are there."""

    earlier: Sequence[Path]
    """Folders of the stages of earlier tasks, in their order."""
    older: Sequence[Path]
    """Those of them whose Fisher information (--ewc-lambda) is in that of the task before this one."""
    own: Path
    """The folder of the stage that ends the task."""

    def at_end(self, run: Run) -> None:
        for line in on_rank_0(self._discard):
            run.announce(line)

    def _discard(self) -> list[str]:
        """What is done, in lines for the log. What can't be deleted is tried again behind the next task."""
        # Of a task that was saved with --save-trained-only, which may have been given before and left out now.
        needed = {at.parent.resolve() for path in complete_checkpoints(str(self.own)) for at, _ in chain_of(path)}
        lines = []
        for folder in self.earlier:
            if folder.resolve() in needed:
                lines.append(f"> --continual-discard: what is in {self.own} is based on {folder}, which stays")
                continue
            try:
                gone = discard_checkpoints(folder)
            except OSError as error:
                lines.append(f"> --continual-discard: the checkpoints in {folder} could not be deleted: {error}")
                continue
            if folder in self.older:
                shutil.rmtree(folder / FISHER_FOLDER, ignore_errors=True)
            if gone:
                lines.append(f"> --continual-discard: deleted {len(gone)} checkpoints of {folder}, a task that is over")
        return lines
