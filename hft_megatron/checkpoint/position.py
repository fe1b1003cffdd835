"""Where a run stands, beyond its tensors. Imports no torch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hft_megatron.errors import UserError

FILE_NAME = "train_state.json"
FORMAT = 3
"""Version of the checkpoint's own files; another one could be read wrongly in silence."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The position after ``iteration`` steps. Learning rate and data order follow from it and the options."""

    iteration: int = 0
    consumed_samples: int = 0
    """Samples over all ranks; names the next example at any layout."""
    skipped_iterations: tuple[int, ...] = ()
    """Numbers (from 1) of those that made no update, under --skip-nonfinite-steps or --iterations-to-skip. They count
    as iterations, and their samples as consumed; the learning rate and the optimizer's step counts go without them."""
    asked_to_skip: tuple[int, ...] = ()
    """Those of them that --iterations-to-skip named."""
    round: int = 0
    """HFT round, from 0."""
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    device: str = "cpu"
    """Kind of device whose random states are in the checkpoint."""
    unit_steps: dict[str, int] = field(default_factory=dict)
    """Updates that each unit's moments in the checkpoint have seen. Under --hft-moments carry units differ in them."""
    base_iteration: int | None = None
    """Checkpoint that holds the weights which this one leaves out (--save-trained-only), or is based on another one."""
    base_folder: str | None = None
    """Folder of that checkpoint's run, seen from this run's, such as ``../task_0``; None where both are one run's."""
    base_digest: str | None = None
    """What the base must be: ``folders.identity_of`` that checkpoint, or of the weights of the --load-hf folder where
    ``base_iteration`` is None. None for a checkpoint that is whole."""

    schedule: dict[str, Any] = field(default_factory=dict)
    """``config.resumed_schedule.Noted`` of the command that saved this; empty in checkpoints of earlier versions."""

    @property
    def is_whole(self) -> bool:
        """Whether the checkpoint holds every weight."""
        return self.base_digest is None

    @property
    def is_based_on_model(self) -> bool:
        """Whether the weights that it leaves out are in the --load-hf folder."""
        return not self.is_whole and self.base_iteration is None

    def write(self, folder: Path) -> None:
        record = {"format": FORMAT, **asdict(self)}
        (folder / FILE_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path, *, option: str = "--load") -> "TrainState":
        """The inverse of ``write``; UserError for a checkpoint of another version and for a file that can't be read.

        ``option`` is what names the run in sentences.
        """
        try:
            record = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
            version = record.pop("format", 1)
            if version == FORMAT:
                for name in ("skipped_iterations", "asked_to_skip"):
                    record[name] = tuple(record.get(name, ()))
                return TrainState(**record)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(
                f"{option} {folder.parent}: {folder.name}/{FILE_NAME} can't be read ({error}); go on from another "
                f"checkpoint."
            ) from error
        raise UserError(
            f"{option} {folder.parent}: {folder.name} has checkpoint format {version}, and this version reads "
            f"{FORMAT}; go on with the version of hft_megatron that saved it."
        )
