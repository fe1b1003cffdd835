"""Where a run stands, beyond its tensors, and which checkpoint is the newest. Imports no torch."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hft_megatron.config.run_folder import CHECKPOINT_TRACKER_FILE
from hft_megatron.errors import UserError

FILE_NAME = "train_state.json"
ITERATION_FOLDER = "iter_{:07d}"
_NAME = re.compile(r"iter_(\d{7,})")
FORMAT = 2
"""Version of the checkpoint's own files; another one could be read wrongly in silence."""


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
    unit_steps: dict[str, int] = field(default_factory=dict)
    """Updates that each unit's moments in the checkpoint have seen. Under --hft-moments carry units differ in them."""

    def write(self, folder: Path) -> None:
        record = {"format": FORMAT, **asdict(self)}
        (folder / FILE_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> "TrainState":
        """The inverse of ``write``; UserError for a checkpoint of another version."""
        record = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        version = record.pop("format", 1)
        if version != FORMAT:
            raise UserError(
                f"--load {folder.parent}: {folder.name} has checkpoint format {version}, and this version reads "
                f"{FORMAT}; go on with the version of hft_megatron that saved it."
            )
        return TrainState(**record)


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


def checkpoint_at(folder: str, iteration: int | None) -> Path:
    """The checkpoint of an iteration, the newest for None; UserError naming those that are there for a missing one."""
    if not Path(folder).is_dir():
        raise UserError(f"--load {folder}: there is no such folder; name the --save folder of a run.")
    if iteration is None:
        newest = newest_checkpoint(folder)
        if newest is None:
            raise UserError(f"--load {folder} holds no checkpoint; name the --save folder of a run that saved one.")
        return newest
    path = Path(folder) / ITERATION_FOLDER.format(iteration)
    if not path.is_dir():
        numbers = sorted(int(match[1]) for each in Path(folder).iterdir() if (match := _NAME.fullmatch(each.name)))
        there = ", ".join(str(number) for number in numbers) or "none"
        raise UserError(f"--iteration {iteration}: --load {folder} has no such checkpoint; there are: {there}.")
    return path
