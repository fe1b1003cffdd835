"""The checkpoint that a run resumes from: the newest complete one, if every byte of it is as it was saved."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hft_megatron.checkpoint.folders import (
    DAMAGED,
    DIGESTS_FILE,
    Checkpoints,
    Digest,
    base_of,
    combined_digest,
    damage_in,
    damage_of_base,
    digest_of,
    iteration_of,
    read_digests,
)
from hft_megatron.checkpoint.position import FILE_NAME as POSITION_FILE
from hft_megatron.checkpoint.position import TrainState
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import CHECKPOINT_TRACKER_FILE, write_atomically
from hft_megatron.engine.lines import refuse_if_unreadable
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan
from hft_megatron.parallel.consensus import gathered, on_rank_0
from hft_megatron.parallel.groups import Placement

_FP32_BYTES = 4
_BF16_BYTES = 2


def checkpoint_bytes(plan: Plan, config: RunConfig, *, bf16: bool) -> int:
    """Bytes of the tensors of one checkpoint that is saved under ``plan``; its index and plan are small beside them.

    Weights in the run's data type, and for trainable units an fp32 master of each bf16 weight and both moments; with
    --hft-frozen-moments host also for units that have trained. Rows that pad the vocabulary are left out.
    """
    everything = plan.trainable_parameters + plan.frozen_parameters
    is_one_plan = config.hft.hft_round_interval == "stage"
    # Later rounds make a whole checkpoint first.
    has_base = config.model.load_hf is not None or config.checkpoint.finetune
    leaves_out = config.checkpoint.save_trained_only and has_base and is_one_plan
    with_weights = plan.trainable_parameters if leaves_out else everything
    with_state = everything if config.hft.hft_frozen_moments == "host" else plan.trainable_parameters
    state_bytes = (3 if bf16 else 2) * _FP32_BYTES
    return with_weights * (_BF16_BYTES if bf16 else _FP32_BYTES) + with_state * state_bytes


def sound_checkpoint(
    found: Checkpoints, placement: Placement, *, fallback: bool, put_aside: bool, announce: Callable[[str], None]
) -> Path | None:
    """The newest checkpoint, with every file read and compared with its digest; None where there is none.

    Collective; ranks share the reading. A damaged checkpoint is a UserError on every rank, naming the file and the
    newest intact checkpoint, or with ``fallback`` (--load-fallback) that one is taken. ``put_aside`` renames the
    damaged ones, so that the next start doesn't find them again. A checkpoint of a megatron-core that this one cannot
    read is a UserError, too.
    """
    damaged: list[tuple[Path, str]] = []
    if found.missing is not None:
        what = "is incomplete (or of an earlier version)" if found.missing.exists() else "does not exist"
        damaged.append((found.missing, f"{found.missing}, which {CHECKPOINT_TRACKER_FILE} names, {what}"))
    good = None
    for path in found.complete:
        damage = damage_of(path, placement)
        if damage is None:
            good = path
            break
        damaged.append((path, damage))
    if good is not None:
        refuse_if_unreadable(good, read_digests(good))
    if not damaged:
        return good
    what = damaged[0][1]
    if good is None:
        raise UserError(
            f"--load {found.folder}: {what}, and there is no older intact checkpoint; copy the folder again, or give "
            f"another one."
        )
    if not fallback:
        raise UserError(
            f"--load {found.folder}: {what}; the newest intact checkpoint is {good.name}: add --load-fallback to "
            f"resume from it."
        )
    for _, damage in damaged:
        aside = f", and adding {DAMAGED} to the name of the damaged one" if put_aside else ""
        announce(f"> --load-fallback: {damage}; resuming from {good.name}{aside}")
    if put_aside:
        on_rank_0(lambda: _put_aside(found.folder, [path for path, _ in damaged if path.exists()], good))
    return good


def _put_aside(folder: Path, damaged: Sequence[Path], good: Path) -> None:
    """Renames the damaged ones and sets the tracker to the good one, so that the next start finds it first."""
    try:
        for path in damaged:
            number = 0
            while (aside := path.with_name(f"{path.name}{'' if number == 0 else f'.{number}'}{DAMAGED}")).exists():
                number += 1
            path.rename(aside)
        write_atomically(good.with_name(CHECKPOINT_TRACKER_FILE), f"{iteration_of(good)}\n")
    except OSError as error:
        raise UserError(f"--load-fallback: the damaged checkpoints in {folder} cannot be renamed: {error}.") from error


def damage_of(path: Path, placement: Placement) -> str | None:
    """The damage of a complete checkpoint, or of its bases; None when they are intact. Collective."""
    return next((damage for damage in gathered(_damage_found_here(path, placement)) if damage is not None), None)


def _damage_found_here(path: Path, placement: Placement) -> str | None:
    """The damage in this rank's share of the files. Raises nothing: other ranks wait for the answer."""
    try:
        digests = read_digests(path)
    except (OSError, ValueError) as error:
        return f"{path / DIGESTS_FILE} cannot be read ({error})"
    # All ranks read the position, which names the checkpoint's base.
    damage = damage_in(path, digests, [POSITION_FILE, *share_of_files(digests, placement)])
    if damage is not None:
        return damage
    state = TrainState.read(path)
    base = base_of(path, state)
    if base is None:
        return None
    return damage_of_base(path, state, base) or _damage_found_here(base, placement)


def share_of_files(digests: Mapping[str, Digest], placement: Placement) -> list[str]:
    """The files of a folder that this rank reads; about the same number of bytes on every rank."""
    largest_first = sorted(digests, key=lambda name: (-digests[name]["bytes"], name))
    return largest_first[placement.rank :: placement.world_size]


def shared_digest(files: Sequence[Path], placement: Placement) -> str:
    """sha256 (hex) over every byte of ``files`` and their names. Collective; ranks share the reading."""
    mine = {path.name: digest_of(path) for path in files[placement.rank :: placement.world_size]}
    return combined_digest({name: digest for one in gathered(mine) for name, digest in one.items()})
