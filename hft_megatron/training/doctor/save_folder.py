"""Whether checkpoints can be written to the save folder, and whether they will fit."""

import math
import os
import shutil
import tempfile
from pathlib import Path

from hft_megatron.config.input_rules import outputs_can_be_written
from hft_megatron.config.schema import CheckpointConfig, RunConfig
from hft_megatron.optimizer.rank_memory import in_bytes
from hft_megatron.training.doctor.findings import Finding, finding_of

WHAT = "save folder"
_PROBE = b"hft-megatron doctor\n"


def save_folder_finding(config: RunConfig, world_size: int) -> Finding:
    """Writes a small file next to where the checkpoints will be, and removes it: rights alone say little about
    read-only mounts and network disks."""
    assert config.checkpoint.save is not None
    path = Path(config.checkpoint.save).resolve()
    allowed = finding_of(WHAT, str(path), lambda: outputs_can_be_written(config, None, world_size))
    if allowed.status != "ok":
        return allowed
    nearest = nearest_folder(path)
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        fix = f"--save {config.checkpoint.save} can't be written: {error.strerror} in {nearest}; choose another folder."
        return Finding(what=WHAT, value=str(path), status="wrong", fix=fix)
    state = "can be written" if nearest == path else "can be made"
    return Finding(what=WHAT, value=f"{path} {state}, {in_bytes(shutil.disk_usage(nearest).free)} free")


def space_finding(save: str, checkpoint_bytes: int, kept: int | None) -> Finding:
    """``checkpoint_bytes`` are those of one checkpoint, and ``kept`` the most that there are at one time."""
    free = shutil.disk_usage(nearest_folder(Path(save).resolve())).free
    return compare_space(save, free, checkpoint_bytes, kept)


def compare_space(save: str, free: int, checkpoint_bytes: int, kept: int | None) -> Finding:
    """Less than one checkpoint is wrong, less than what the run comes to hold a warning. ``kept`` None: not known."""
    one = in_bytes(checkpoint_bytes)
    value = f"{in_bytes(free)} free, a checkpoint takes about {one}"
    if kept is not None and kept > 1:
        value += f", {kept} at a time {in_bytes(kept * checkpoint_bytes)}"
    what = "space to save"
    if free < checkpoint_bytes:
        fix = f"--save {save} has no room for one checkpoint of {one}: make room, or choose another folder."
        return Finding(what=what, value=value, status="wrong", fix=fix)
    if kept is not None and free < kept * checkpoint_bytes:
        holds = free // checkpoint_bytes
        fix = (
            f"--save {save} has room for {holds} of {kept} checkpoints: make room, or keep fewer "
            f"(--keep-last N holds N + 1 at a time)."
        )
        return Finding(what=what, value=value, status="warning", fix=fix)
    return Finding(what=what, value=value)


def checkpoints_at_a_time(checkpoint: CheckpointConfig, train_iters: int) -> int:
    """The most checkpoints of this run that the folder holds at one time: the newest is complete before others go."""
    if train_iters == 0:
        return 0
    interval = checkpoint.save_interval or train_iters
    all_of_them = math.ceil(train_iters / interval)
    if checkpoint.keep_last is None and checkpoint.save_retain_interval is None:
        return all_of_them
    retained = 0 if checkpoint.save_retain_interval is None else train_iters // checkpoint.save_retain_interval
    return min(all_of_them, (checkpoint.keep_last or 1) + 1 + retained)


def nearest_folder(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
