"""Position of a run, beyond its tensors. Imports no torch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hft_megatron.errors import UserError

FILE_NAME = "train_state.json"
FORMAT = 3
"""Version of the checkpoint's own files; others are refused, since they could be misread in silence."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The position after ``iteration`` steps. Learning rate and data order follow from it and the options."""

    iteration: int = 0
    consumed_samples: int = 0
    """Samples over all ranks; gives the next example in any layout."""
    skipped_iterations: tuple[int, ...] = ()
    """Numbers (from 1) of iterations without an update, under --skip-nonfinite-steps or --iterations-to-skip. They
    count as iterations, and their samples as consumed; the learning rate and the optimizer's step counts skip them."""
    asked_to_skip: tuple[int, ...] = ()
    """Skipped iterations that --iterations-to-skip named."""
    round: int = 0
    """HFT round, from 0."""
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    device: str = "cpu"
    """Kind of device whose random states the checkpoint holds."""
    unit_steps: dict[str, int] = field(default_factory=dict)
    """Updates in each unit's moments. Under --hft-moments carry they differ between units."""
    base_iteration: int | None = None
    """Checkpoint with the weights that this one leaves out (--save-trained-only), or one that has a base itself."""
    base_folder: str | None = None
    """Folder of that checkpoint's run, relative to this run's, such as ``../task_0``; None for the same run."""
    base_digest: str | None = None
    """Digest of the base: ``folders.identity_of`` that checkpoint, or of the weights of the --load-hf folder where
    ``base_iteration`` is None. None for a whole checkpoint."""

    schedule: dict[str, Any] = field(default_factory=dict)
    """``trainer.resume.Noted`` of the command that saved this; empty in checkpoints of earlier versions."""

    @property
    def is_whole(self) -> bool:
        """Return whether the checkpoint holds every weight."""
        return self.base_digest is None

    @property
    def is_based_on_model(self) -> bool:
        """Return whether the weights that it leaves out are in the --load-hf folder."""
        return not self.is_whole and self.base_iteration is None

    def write(self, folder: Path) -> None:
        record = {"format": FORMAT, **asdict(self)}
        (folder / FILE_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path, *, option: str = "--load") -> "TrainState":
        """The inverse of ``write``; UserError for a checkpoint of another version and for a file that cannot be read.

        ``option`` names the run in errors.
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
                f"{option} {folder.parent}: {folder.name}/{FILE_NAME} cannot be read ({error}); resume from another "
                f"checkpoint."
            ) from error
        raise UserError(
            f"{option} {folder.parent}: {folder.name} has checkpoint format {version}, but this version reads "
            f"{FORMAT}; resume with the version of hft_megatron that saved it."
        )
