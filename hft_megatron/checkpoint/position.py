"""Where a run stands, beyond its tensors, and which checkpoint is the newest. Imports no torch."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from hft_megatron.config.run_folder import CHECKPOINT_TRACKER_FILE
from hft_megatron.errors import UserError

FILE_NAME = "train_state.json"
ITERATION_FOLDER = "iter_{:07d}"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The position after ``iteration`` optimizer steps. The schedule and the data order are functions of it."""

    iteration: int = 0
    consumed_samples: int = 0
    """Samples over all ranks; names the next example at any layout."""
    round: int = 0
    """HFT round, from 0."""
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    device: str = "cpu"
    """Kind of device whose random states are in the checkpoint."""

    def write(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> "TrainState":
        return TrainState(**json.loads((folder / FILE_NAME).read_text(encoding="utf-8")))


def newest_checkpoint(folder: str) -> Path | None:
    """The checkpoint that the tracker file names, None where nothing was saved yet; UserError for a broken tracker."""
    tracker = Path(folder) / CHECKPOINT_TRACKER_FILE
    if not tracker.exists():
        return None
    text = tracker.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"\d+", text):
        raise UserError(f"--load {folder}: {CHECKPOINT_TRACKER_FILE} holds {text!r}, which is not an iteration number.")
    path = Path(folder) / ITERATION_FOLDER.format(int(text))
    if not path.is_dir():
        raise UserError(f"--load {folder}: {CHECKPOINT_TRACKER_FILE} names iteration {text}, but {path} is not there.")
    return path
