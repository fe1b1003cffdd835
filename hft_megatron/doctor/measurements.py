"""Measurements of waits in a run: reductions in every group of ranks, and the --save folder."""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, median_low

import torch
import torch.distributed as dist

from hft_megatron.config.checkpoint import CheckpointConfig, outputs_can_be_written
from hft_megatron.config.run import RunConfig
from hft_megatron.costs.rank_memory import in_bytes
from hft_megatron.doctor.findings import Finding, GroupSpeed, RankReport, Row, finding_of, ranks_in_words

ELEMENTS = 1 << 22
"""Elements in fp32: 16.8 MB, about one bucket of gradients."""
_WARM_UPS = 2
"""Unmeasured repetitions, of which the first connects the ranks."""
_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class AllReduceSpeed:
    """Measurement of one rank."""

    message_bytes: int
    seconds: float
    """Time of one all-reduce, the median of several."""
    is_right: bool


def measure_all_reduce(group: dist.ProcessGroup, device: torch.device, *, elements: int = ELEMENTS) -> AllReduceSpeed:
    """All-reduces ``elements`` fp32 numbers on every rank of ``group`` a few times; collective over it.

    Each rank adds its place in the group plus 1, so that every entry of the sum over n ranks is n (n + 1) / 2.
    """
    size, place = dist.get_world_size(group), dist.get_rank(group) + 1
    tensor = torch.empty(elements, dtype=torch.float32, device=device)
    took, is_right = [], True
    for _ in range(_WARM_UPS + _REPEATS):
        tensor.fill_(place)
        torch.cuda.synchronize()
        dist.barrier(group)
        begun = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - begun)
        is_right = is_right and bool((tensor == size * (size + 1) / 2).all())
    return AllReduceSpeed(
        message_bytes=tensor.numel() * tensor.element_size(), seconds=median(took[_WARM_UPS:]), is_right=is_right
    )


SLOW = 3.0
"""Ratio to the median of its kind above which a group is reported: the others wait for it in every step."""


def speed_findings(reports: Sequence[RankReport]) -> Iterator[Row]:
    """One row for each kind of group that has more than one rank, with the time of the slowest group."""
    kinds = dict.fromkeys(speed.kind for report in reports for speed in report.speeds)
    for kind in kinds:
        yield Row(finding=_of_kind(f"all-reduce, {kind}", _slowest_view(reports, kind), reports))
    if not kinds:
        yield Row(finding=Finding(what="all-reduce", value="every group has one rank: nothing is sent"))
    for group in _slowest_view(reports, "tensor"):
        hosts = {reports[rank].host for rank in group.ranks}
        if len(hosts) > 1:
            fix = (
                "Tensor-parallel ranks communicate in every layer, which is slow between hosts: set "
                "--tensor-model-parallel-size to at most the ranks of a host, and use --pipeline-model-parallel-size "
                "for the rest."
            )
            value = f"a group of {len(group.ranks)} ranks spans {len(hosts)} hosts"
            yield Row(finding=Finding(what="tensor groups", value=value, status="warning", fix=fix))
            return


def _slowest_view(reports: Sequence[RankReport], kind: str) -> list[GroupSpeed]:
    """Each group of a kind once, as its slowest rank saw it; wrong where any rank saw a wrong sum."""
    groups: dict[tuple[int, ...], list[GroupSpeed]] = {}
    for report in reports:
        for speed in report.speeds:
            if speed.kind == kind:
                groups.setdefault(speed.ranks, []).append(speed)
    return [min(seen, key=lambda speed: (speed.is_right, -speed.seconds)) for seen in groups.values()]


def _of_kind(what: str, groups: Sequence[GroupSpeed], reports: Sequence[RankReport]) -> Finding:
    slowest = max(groups, key=lambda group: group.seconds)
    value = (
        f"{in_bytes(slowest.message_bytes)} among {len(slowest.ranks)} ranks in {slowest.seconds * 1e3:.1f} ms, "
        f"{in_bytes(slowest.bytes_per_second)}/s"
    )
    if len(groups) > 1:
        value += f" in the slowest of {len(groups)} groups"
    for group in groups:
        if not group.is_right:
            fix = (
                f"The sum over {_members(group, reports)} is wrong, and so would training be: "
                f"a device or the network between them corrupts data; leave them out and have them tested."
            )
            return Finding(what=what, value=value, status="wrong", fix=fix)
    usual = median_low([group.seconds for group in groups])
    if slowest.seconds > SLOW * usual:
        fix = (
            f"The group of {_members(slowest, reports)} takes {slowest.seconds / usual:.1f} times as long as usual, "
            f"and all others wait for it: check the links and the load of these hosts."
        )
        return Finding(what=what, value=value, status="warning", fix=fix)
    return Finding(what=what, value=value)


def _members(group: GroupSpeed, reports: Sequence[RankReport]) -> str:
    return ranks_in_words([reports[rank] for rank in group.ranks])


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
        fix = (
            f"--save {config.checkpoint.save} cannot be written: {error.strerror} in {nearest}; choose another folder."
        )
        return Finding(what=WHAT, value=str(path), status="wrong", fix=fix)
    state = "can be written" if nearest == path else "can be made"
    return Finding(what=WHAT, value=f"{path} {state}, {in_bytes(shutil.disk_usage(nearest).free)} free")


def space_finding(save: str, checkpoint_bytes: int, kept: int | None) -> Finding:
    """Check of the free space; ``checkpoint_bytes`` is the size of one checkpoint, ``kept`` the most at one time."""
    free = shutil.disk_usage(nearest_folder(Path(save).resolve())).free
    return compare_space(save, free, checkpoint_bytes, kept)


def compare_space(save: str, free: int, checkpoint_bytes: int, kept: int | None) -> Finding:
    """Check of the free space: wrong below one checkpoint, a warning below all kept ones. ``kept`` None: unknown."""
    one = in_bytes(checkpoint_bytes)
    value = f"{in_bytes(free)} free, a checkpoint takes about {one}"
    if kept is not None and kept > 1:
        value += f", {kept} at a time {in_bytes(kept * checkpoint_bytes)}"
    what = "space to save"
    if free < checkpoint_bytes:
        fix = f"--save {save} has no space for one checkpoint of {one}: free some space, or choose another folder."
        return Finding(what=what, value=value, status="wrong", fix=fix)
    if kept is not None and free < kept * checkpoint_bytes:
        holds = free // checkpoint_bytes
        fix = (
            f"--save {save} has space for {holds} of {kept} checkpoints: free some space, or keep fewer "
            f"(--keep-last N holds N + 1 at a time)."
        )
        return Finding(what=what, value=value, status="warning", fix=fix)
    return Finding(what=what, value=value)


def checkpoints_at_a_time(checkpoint: CheckpointConfig, train_iters: int) -> int:
    """The most checkpoints of this run in the folder at one time: the newest is complete before others are deleted."""
    if train_iters == 0:
        return 0
    interval = checkpoint.save_interval or train_iters
    all_of_them = math.ceil(train_iters / interval)
    if checkpoint.keep_last is None and checkpoint.save_retain_interval is None:
        return all_of_them
    retained = 0 if checkpoint.save_retain_interval is None else train_iters // checkpoint.save_retain_interval
    return min(all_of_them, (checkpoint.keep_last or 1) + 1 + retained)


def nearest_folder(path: Path) -> Path:
    """``path``, or the nearest existing folder above it."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
