"""Explains an allocation that failed: the rank's need by formula, and the options that need less."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import psutil
import torch

from hft_megatron.costs.memory_fit import verdict
from hft_megatron.costs.rank_memory import in_bytes, memory_of_run
from hft_megatron.errors import RankFailed
from hft_megatron.hft.plan import Plan
from hft_megatron.parallel.groups import Placement, host_name

if TYPE_CHECKING:
    # It reads tasks, whose evaluation says here that its memory is gone.
    from hft_megatron.trainer.inputs import Inputs

_ASKED = re.compile(r"[Tt]ried to allocate (\d[\d.]* ?\w+)")
_BY_TEXT = ("can't allocate memory", "not enough memory", "out of memory")
"""Texts of torch's allocator for CPUs, and of CUDA and NCCL where their errors have no type of their own."""
_LESS = 0.9
"""Share of the need by formula that advice must come below: the options did not fit, whatever the formula says."""


@contextlib.contextmanager
def memory_errors_in_words(
    inputs: "Inputs", placement: Placement, *, plan: Callable[[], Plan], when: Callable[[], str]
) -> Iterator[None]:
    """Within it, a failed allocation raises RankFailed, with one sentence for this rank.

    ``plan`` is that of the round and ``when`` describes the position of the run, both at the time of the failure.
    """
    with memory_errors_with_advice(placement, when=when, advice=lambda: _advice(inputs, placement, plan())):
        yield


@contextlib.contextmanager
def memory_errors_with_advice(
    placement: Placement, *, when: Callable[[], str], advice: Callable[[], str]
) -> Iterator[None]:
    """Like ``memory_errors_in_words``, for memory that other options than those of training reduce; ``advice`` ends the
    sentence."""

    def sentence(error: BaseException) -> str:
        where = f"rank {placement.rank} on {host_name()} ({placement.coordinates})"
        return f"{where} ran out of memory {when()}{_requested(error)}; {advice()}"

    with memory_errors_as(sentence):
        yield


@contextlib.contextmanager
def memory_errors_as(sentence: Callable[[BaseException], str]) -> Iterator[None]:
    """Within it, a failed allocation raises RankFailed with the ``sentence`` of its error."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_of_memory(error):
            raise
        raise RankFailed(sentence(error)) from error


def is_of_memory(error: BaseException) -> bool:
    """Return whether the error is a failed allocation, on the device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _BY_TEXT)


def _requested(error: BaseException) -> str:
    asked = _ASKED.search(str(error))
    return f" (allocating {asked[1]} failed)" if asked else ""


def _advice(inputs: "Inputs", placement: Placement, plan: Plan) -> str:
    on_cuda, room = placement.device.type == "cuda", _room(placement)
    model = memory_of_run(
        inputs.config,
        inputs.shape,
        placement.world_size,
        sequences_per_sample=inputs.method.sequences_per_sample,
        bf16=inputs.config.training.bf16 is True,
        on_cuda=on_cuda,
    )
    memory = model.stage(plan.trains, placement.pipeline_rank)
    judged = verdict(model, plan.trains, min(room, int(_LESS * model.largest(plan.trains).total)))
    ways = [proposal.words for proposal in (*judged.options[:2], *judged.layouts[:1])]
    less = f"use {', or '.join([*ways, 'a smaller --seq-length'])}"
    if memory.total <= room:
        less += ", or check what else uses memory there (see `hft-megatron doctor`)"
    batch = model.micro_batch
    return (
        f"by formula (`plan --memory`) it needs {in_bytes(memory.total)} of {in_bytes(room)}: weights "
        f"{in_bytes(memory.weights)}, gradients {in_bytes(memory.gradients)}, optimizer {in_bytes(memory.optimizer)}, "
        f"activations and logits of {batch.sequences} x {batch.seq_length:,} tokens "
        f"{in_bytes(memory.activations + memory.logits)}; {less}."
    )


def _room(placement: Placement) -> int:
    """Bytes of this rank's device, or its share of the host's memory."""
    if placement.device.type == "cuda":
        return int(torch.cuda.get_device_properties(placement.device).total_memory)
    return int(psutil.virtual_memory().total) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
