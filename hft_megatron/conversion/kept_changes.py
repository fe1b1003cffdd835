"""FAPM, DARE and TIES: keep part of what fine-tuning changed, entry by entry, and reset the other entries to the base.

As everything in ``merging``: tensor by tensor, without training, ranks or a model. A change is tau = W - W0, with a
tuned model's weight W and the base's W0, in fp32.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import floor
from typing import Any

import torch
from torch import Tensor

from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.conversion.load import check_weights
from hft_megatron.conversion.merge_inputs import MergeInputs
from hft_megatron.conversion.merging import Combine, announce_dtypes, check_both, merge, recorded
from hft_megatron.conversion.save import Announce
from hft_megatron.conversion.weight_files import notes_on_folder
from hft_megatron.hft.units import units_of

BLOCK = 1 << 18
"""Entries that are worked on together where torch would make a copy of all, and that TIES merges of all models."""


def keep_safe_changes(inputs: MergeInputs, sparsity: float, announce: Announce) -> None:
    """FAPM (arXiv 2509.08255): keeps only the changes of every matrix that are large, and small beside the weight.

    S = |tau| - mean(|W0|) x |tau| / |W0|. The share 1 - ``sparsity`` of the entries with the largest S keeps the tuned
    value and all others are reset to the base's, both bit for bit. Entries equal to the last one kept are kept as well.
    Where W0 is 0, S is minus infinity, the limit for a small W0: those are reset first. Norms, which are no matrices,
    keep the tuned values. Raises UserError as ``half_reset`` does.
    """
    changed = entries = 0

    def pick(name: str, tuned: HuggingFaceWeights, base: HuggingFaceWeights) -> Iterator[Tensor]:
        nonlocal changed, entries
        new, old = tuned.read(name), base.read(name)
        if new.dim() == 1:
            yield new
            return
        picked = torch.where(is_safe(new, old, sparsity), new, old)
        # Not a sum, for which torch would make a copy in int64.
        changed, entries = changed + int(torch.count_nonzero(picked != old)), entries + picked.numel()
        yield picked

    _write(inputs, pick, "fapm", {"sparsity": sparsity, "rule": "|tau| - mean(|W0|) x |tau| / |W0|"}, announce)
    announce(f"fapm: {changed:,} of the {entries:,} entries of matrices differ from the base's, with the tuned values")


def is_safe(tuned: Tensor, base: Tensor, sparsity: float) -> Tensor:
    """Entries of a matrix that FAPM keeps, bool. Needs two more fp32 tensors of its size."""
    score = base.to(torch.float32, copy=True).abs_()
    # By blocks: of the whole tensor torch would make a copy in fp64.
    total = sum(float(block.sum(dtype=torch.float64)) for block in score.view(-1).split(BLOCK))
    zero, mean = score == 0, total / score.numel()
    change = _change(tuned, base).abs_()
    # The quotient first: mean / |W0| would be infinite for a W0 that is all but 0, also where nothing changed.
    torch.div(change, score, out=score).mul_(-mean).add_(change).masked_fill_(zero, -torch.inf)
    return score >= _last_kept(change.copy_(score), 1 - sparsity)


def _last_kept(values: Tensor, share: float) -> float:
    """Smallest of the largest ``share`` of contiguous fp32 values, whose order is lost; infinity if none is kept."""
    kept = floor(share * values.numel() + 0.5)
    if kept == 0:
        return torch.inf
    sorted_at = values.numel() - kept
    flat = values.view(-1).numpy()
    flat.partition(sorted_at)
    return float(flat[sorted_at])


def drop_changes(inputs: MergeInputs, rate: float, seed: int, announce: Announce) -> None:
    """DARE (arXiv 2311.03099): drops each entry's change with probability ``rate``, divides the others by 1 - rate.

    W = W0 + tau / (1 - rate), or W0. Every tensor is drawn by a generator of its own, seeded by ``seed`` and its name,
    so that neither order nor files matter. A rate of 0 gives the tuned model bit for bit. Raises UserError as
    ``half_reset`` does.
    """

    def drop(name: str, tuned: HuggingFaceWeights, base: HuggingFaceWeights) -> Iterator[Tensor]:
        if rate == 0:
            yield tuned.read(name)
            return
        start = base.read(name).float()
        rescaled = tuned.read(name).to(torch.float32, copy=True).sub_(start).div_(1 - rate).add_(start)
        dropped = torch.rand(start.shape, generator=_generator(seed, name)) < rate
        yield torch.where(dropped, start, rescaled, out=rescaled)

    rule = {"drop_rate": rate, "seed": seed, "rule": "base + (tuned - base) / (1 - drop_rate), or base"}
    _write(inputs, drop, "dare", rule, announce)
    announce(f"dare: each entry of {inputs.output} is the base's with probability {rate:g}, by seed {seed}")


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def merge_changes(inputs: Sequence[MergeInputs], density: float, coefficient: float, announce: Announce) -> None:
    """TIES (arXiv 2306.01708): merges the largest changes of several models of one base where they agree.

    Of every tensor and model the share ``density`` of the largest |tau| is kept (entries equal to the last one are
    kept as well). The sign of an entry is that of the sum of the kept changes, and W = W0 + ``coefficient`` x the mean
    of the changes with that sign. Where the sum is 0 the base's value stays. Of one model it is its trimming alone.
    Data type, config.json and tokenizer are those of the first of ``inputs``, which share base, output and shape.
    Raises UserError as ``half_reset`` does.
    """
    first, *others = inputs
    digests = [check_weights(one.tuned, one.shape, option="--others") for one in others]
    with ExitStack() as stack:
        opened = [stack.enter_context(HuggingFaceWeights(one.tuned, option="--others")) for one in others]
        _announce_others(first, list(zip(others, opened, strict=True)), announce)

        def elect(name: str, tuned: HuggingFaceWeights, base: HuggingFaceWeights) -> Iterator[Tensor]:
            old, new = base.read(name), [model.read(name) for model in (tuned, *opened)]
            smallest = torch.tensor([_last_kept(_change(one, old).abs_(), density) for one in new])
            merged = torch.empty(old.shape, dtype=torch.float32)
            flat = [one.reshape(-1).split(BLOCK) for one in (merged, old, *new)]
            for part, start, *changed in zip(*flat, strict=True):
                part.copy_(_elected(start, changed, smallest, coefficient))
            yield merged

        rule = {
            "density": density,
            "coefficient": coefficient,
            "others": [{"folder": one.tuned, "digest": digest} for one, digest in zip(others, digests, strict=True)],
        }
        _write(first, elect, "ties", rule, announce)
    announce(
        f"ties: {first.output} has the base's weights and the largest {density:g} of the changes of {len(inputs)} "
        f"{'model' if len(inputs) == 1 else 'models'}"
    )


def _announce_others(
    first: MergeInputs, others: Sequence[tuple[MergeInputs, HuggingFaceWeights]], announce: Announce
) -> None:
    """Announces for the other models what ``merge`` announces for the first model and the base."""
    names = [f"{unit.name}.weight" for unit in units_of(first.shape)]
    with HuggingFaceWeights(first.tuned, option="--tuned") as tuned:
        dtypes = {name: tuned.dtype(name) for name in names}
    for inputs, weights in others:
        for note in (*inputs.notes, *notes_on_folder(inputs.tuned)):
            announce(note)
        announce_dtypes(dtypes, {name: weights.dtype(name) for name in names}, f"--others {inputs.tuned}", announce)


def _elected(start: Tensor, changed: Sequence[Tensor], smallest: Tensor, coefficient: float) -> Tensor:
    """Merges a block of a tensor, (entries,) fp32: the base's and all models' values, and each model's smallest |tau|
    that is kept."""
    changes = torch.stack([_change(one, start) for one in changed])
    changes.masked_fill_(changes.abs() < smallest[:, None], 0)
    sign = changes.sum(0).sign()
    agrees = (changes.sign() == sign) & (sign != 0)
    mean = torch.where(agrees, changes, 0.0).sum(0) / agrees.sum(0).clamp(min=1)
    return start.float() + coefficient * mean


def _change(tuned: Tensor, base: Tensor) -> Tensor:
    """tau, fp32, in memory of its own; those that were read are maps of files."""
    change = tuned.to(torch.float32, copy=True)
    # By blocks: of a whole base in half precision torch would make a copy in fp32.
    for part, start in zip(change.view(-1).split(BLOCK), base.reshape(-1).split(BLOCK), strict=True):
        part.sub_(start)
    return change


def _write(inputs: MergeInputs, combine: Combine, name: str, rule: Mapping[str, Any], announce: Announce) -> None:
    """Writes the folder with ``NAME.json``, which records the rule and its inputs."""
    merge(inputs, combine, [recorded(inputs, check_both(inputs), name, rule)], announce)
