"""Sustained rates of each of two ranks while both work: products, memory, and transfers to each other.

A rank of ``torchrun``, started by ``step_time.py`` with its job as JSON: the local shapes of a layer's matrices and of
the head's, tokens, and who exchanges (``data``, ``tensor`` or ``pipeline``); rank 0 writes the rates to a file.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hft_megatron.costs.part_times import ATTENTION_BACKWARD

LAYERS_APART = 4
"""Number of layers whose weights take turns, so that none waits in the cache for its next product."""
ROUNDS = 3
"""Timed repetitions of everything, after one that isn't timed."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Sizes of a measurement."""

    layer: Sequence[tuple[int, int]]
    """(rows, columns) of each matrix of a layer, on one rank."""
    layers: int
    """Layers of the model: the head's share of the products is one in this many."""
    head: tuple[int, int]
    tokens: int
    """Tokens of a micro-batch, which is one sequence."""
    heads: int
    """Heads of attention on one rank."""
    channels: int
    """Channels of a head."""
    memory_elements: int
    """Elements of each of two tensors in the passes over memory."""
    exchange: str
    buffer_elements: int
    """Elements of the gradient buffer, for ``data``."""
    message_elements: int
    """Elements of hidden states, for the others."""


def seconds_of(work: Callable[[], object], meet: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Mean time of ``rounds``, which all ranks begin together."""
    work()
    taken = 0.0
    for _ in range(rounds):
        meet()
        begun = time.perf_counter()
        work()
        taken += time.perf_counter() - begun
    return taken / rounds


def measure(job: Job) -> dict[str, float]:
    """This rank's rates, by the names of ``costs.part_times.Device``; collective."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    meet = dist.barrier
    forward, weights = _products(job, meet)
    passes = _pass(job.memory_elements, meet)
    sent, taken = _exchange(job, meet)
    return {
        "tflops": forward / 1e12,
        "weight_gradient_tflops": weights / 1e12,
        "attention_tflops": _attention(job, meet) / 1e12,
        "memory_bandwidth": 3 * 4 * job.memory_elements / passes / 1e9,
        "node_bandwidth": sent / taken / 1e9,
    }


def _products(job: Job, meet: Callable[[], object]) -> tuple[float, float]:
    """FLOP per second of a model's products: forward with input gradients, and for gradients of weights."""
    import torch

    # Each shape with the number of times that the model has it per product here.
    shapes = [(*shape, job.layers / LAYERS_APART) for _ in range(LAYERS_APART) for shape in job.layer]
    shapes.append((*job.head, 1.0))
    flops, seconds = 0.0, [0.0, 0.0]
    made = [(torch.randn(rows, columns), torch.zeros(rows, columns)) for rows, columns, _ in shapes]
    for turn in range(1 + ROUNDS):
        meet()
        for (rows, columns, share), (weight, total) in zip(shapes, made, strict=True):
            inputs, outputs = torch.randn(job.tokens, columns), torch.randn(job.tokens, rows)
            begun = time.perf_counter()
            inputs.mm(weight.t())
            outputs.mm(weight)
            between = time.perf_counter()
            total.addmm_(outputs.t(), inputs)
            ended = time.perf_counter()
            if turn > 0:
                flops += share * 2 * job.tokens * rows * columns
                seconds[0] += share * (between - begun)
                seconds[1] += share * (ended - between)
    return 2 * flops / seconds[0], flops / seconds[1]


def _attention(job: Job, meet: Callable[[], object]) -> float:
    """FLOP per second of a forward and a backward pass, by the engine's own function."""
    import torch

    from hft_megatron.model.torch_attention import causal_attention

    shape = (1, job.heads, job.tokens, job.channels)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape)

    def passes() -> None:
        torch.autograd.grad(causal_attention(query, key, value, None), (query, key, value), gradient)

    taken = seconds_of(passes, meet, 10 * ROUNDS)
    return (1 + ATTENTION_BACKWARD) * 2 * job.heads * job.channels * job.tokens**2 / taken


def _pass(elements: int, meet: Callable[[], object]) -> float:
    """Seconds of a sum in place, which reads two tensors and writes one."""
    import torch

    left, right = torch.zeros(elements), torch.ones(elements)
    return seconds_of(lambda: left.add_(right), meet)


def _exchange(job: Job, meet: Callable[[], object]) -> tuple[float, float]:
    """Bytes that a rank sends, and the seconds that takes."""
    import torch
    import torch.distributed as dist

    from hft_megatron.parallel.direct_exchange import BLOCKS_AHEAD, AllGather, ReduceScatter

    group, other = dist.group.WORLD, 1 - dist.get_rank()
    assert group is not None
    if job.exchange == "data":
        buffer = torch.zeros(job.buffer_elements // 2 * 2)
        shard = buffer.view(2, -1)[dist.get_rank()]

        def both() -> None:
            ReduceScatter(shard, buffer, group, ahead=BLOCKS_AHEAD).wait()
            AllGather(buffer, shard, group).wait()

        return float(2 * shard.nbytes), seconds_of(both, meet)
    message, received = torch.zeros(job.message_elements), torch.zeros(job.message_elements)
    if job.exchange == "tensor":
        # Each of two ranks sends half of it twice.
        return float(message.nbytes), seconds_of(lambda: dist.all_reduce(message), meet, 20 * ROUNDS)

    def swap() -> None:
        works = [dist.P2POp(dist.isend, message, other), dist.P2POp(dist.irecv, received, other)]
        for work in dist.batch_isend_irecv(works):
            work.wait()

    return float(message.nbytes), seconds_of(swap, meet, 20 * ROUNDS)


def main() -> None:
    """The program."""
    import torch.distributed as dist

    words: dict[str, Any] = json.loads(sys.argv[1])
    job = Job(**{**words, "layer": [tuple(shape) for shape in words["layer"]], "head": tuple(words["head"])})
    dist.init_process_group("gloo")
    found: list[Any] = [None, None]
    dist.all_gather_object(found, measure(job))
    if dist.get_rank() == 0:
        means = {name: sum(rank[name] for rank in found) / len(found) for name in found[0]}
        Path(sys.argv[2]).write_text(json.dumps({"job": asdict(job), "rates": means}), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
