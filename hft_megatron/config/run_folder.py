"""Files at the top of a run's --save folder that more than one part of the package knows, and how they are written."""

import os
from pathlib import Path

RESOLVED_CONFIG_FILE = "resolved_config.yaml"
"""Every option of the run with its value, readable by ``--config``."""
RUN_IDENTITY_FILE = "run_identity.json"
"""Identity of the run: a command that differs in it is refused."""
SPECTRUM_FILE = "spectrum.json"
"""The scores of --hft-selection spectrum, which a resumed run takes over: its own could differ in the last bits."""
REFERENCE_FILE = "reference.json"
"""The checkpoint that a preference tuning started from with --finetune, and that it compares with."""
FISHER_FOLDER = "fisher"
"""Fisher information of the tasks up to this run's, and its last weights, for the task that follows (--ewc-lambda)."""
FINISHED_FILE = "finished.json"
"""Last iteration of a run whose checkpoints were deleted (--continual-discard)."""
STATUS_FILE = "status.json"
"""Outcome of the last command that used the folder."""
BILL_FILE = "bill.json"
"""Measured costs of the last command's steps on every rank, beside full fine-tuning by formula."""
CHECKPOINT_TRACKER_FILE = "latest_checkpointed_iteration.txt"
"""The iteration of the newest complete checkpoint; Megatron's name. Written last."""


def same_folder(one: str, other: str | None) -> bool:
    """Return whether two options name the same folder, however it is spelled."""
    return other is not None and Path(one).resolve() == Path(other).resolve()


def found_again(folder: Path, *, beside: Path) -> Path:
    """Path of another run's ``folder`` that the run in ``beside`` has recorded.

    If it is gone, the folder of its name beside that run: runs side by side, such as those of --stages, move together.
    """
    moved = beside.resolve().parent / folder.name
    # With os.path, which treats a folder that cannot be read as gone.
    return (moved if os.path.isdir(moved) and not os.path.exists(folder) else folder).resolve()


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that a reader, or a crash at any moment, sees the old contents or the new, never a part.

    Raises OSError when the folder is missing or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Has a file's contents, or the names in a folder, on the disk, so that a power cut leaves them. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
