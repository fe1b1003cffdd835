"""Whether a rank's part of the model, and of its training, fits into the memory that the rank has. Pure: no torch."""

from hft_megatron.hft.plan import Plan
from hft_megatron.optimizer.memory_fit import verdict
from hft_megatron.optimizer.rank_memory import MemoryModel, in_bytes
from hft_megatron.training.doctor.findings import Finding

WHAT = "memory of a rank"
_ELSE = "ask `hft-megatron plan --memory` about larger layouts with recomputation, or use a smaller --seq-length"


def memory_finding(model: MemoryModel, plan: Plan, room: int) -> Finding:
    """Wrong where not even the model, its gradients and its optimizer fit into ``room`` bytes; a warning where the
    longest sequences would not, which the data may not have."""
    judged = verdict(model, plan.trains, room)
    memory, batch = judged.memory, model.micro_batch
    value = (
        f"{in_bytes(memory.total)} of {in_bytes(room)}: weights {in_bytes(memory.weights)}, gradients "
        f"{in_bytes(memory.gradients)}, optimizer {in_bytes(memory.optimizer)}, activations and logits of "
        f"{batch.sequences} x {batch.seq_length:,} tokens {in_bytes(memory.activations + memory.logits)}"
    )
    if judged.fits:
        return Finding(what=WHAT, value=value)
    ways = [f"add {proposal.words}" for proposal in judged.options[:1]]
    ways += [f"use {proposal.words}" for proposal in judged.layouts[:1]]
    advice = ", or ".join(ways) or _ELSE
    if memory.before_activations > room:
        return Finding(what=WHAT, value=value, status="wrong", fix=f"It does not fit: {advice}.")
    fix = f"It does not fit where sequences are as long as --seq-length allows: {advice}."
    return Finding(what=WHAT, value=value, status="warning", fix=fix)
