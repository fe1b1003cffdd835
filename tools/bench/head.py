"""Measures the head and its loss against megatron-core's own, paired and alternating, into results/head.json.

Run: ``python tools/bench/head.py`` on a machine that does nothing else, or with ``--render`` for the line only. One
forward and backward pass on CPU in fp32 over 8,192 tokens, with 32,000 rows of the vocabulary (one chunk) and with
131,072 (several). The memory of both is asserted in tests/model/test_head.py.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bill import environment
from result_file import in_turn, measure_and_render

RESULTS = Path(__file__).parent / "results" / "head.json"
TOKENS, HIDDEN = 8192, 512
ROWS = (32_000, 131_072)
WAYS = ("megatron-core's", "chunked")


def make_passes(rows: int, group: Any) -> dict[str, Callable[[], None]]:
    """A forward and backward pass of either way, over the same tensors, in a tensor-parallel group of one rank."""
    import torch
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy

    from hft_megatron.model.head import VocabularyHead

    config = ModelParallelConfig(perform_initialization=False)
    own = ColumnParallelLinear(
        HIDDEN,
        rows,
        config=config,
        init_method=torch.nn.init.zeros_,
        bias=False,
        gather_output=False,
        tp_group=group,
    )
    head = VocabularyHead(own, config, real_rows=rows)
    torch.nn.init.normal_(own.weight, std=0.02)
    own.weight.main_grad = torch.zeros_like(own.weight)
    hidden = torch.randn(TOKENS, 1, HIDDEN, requires_grad=True)
    labels = torch.randint(0, rows, (TOKENS, 1))

    def of_the_engine() -> None:
        vocab_parallel_cross_entropy(own(hidden)[0], labels).sum().backward()
        own.weight.main_grad.add_(own.weight.grad)  # as DistributedDataParallel does
        own.weight.grad = hidden.grad = None

    def chunked() -> None:
        head(hidden, labels=labels)[0].sum().backward()
        own.weight.grad = hidden.grad = None

    return dict(zip(WAYS, (of_the_engine, chunked), strict=True))


def measure(pairs: int) -> dict[str, Any]:
    """Everything that the result file holds."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from hft_megatron.config.parallel import ParallelConfig
    from hft_megatron.engine import cpu_backend
    from hft_megatron.parallel.groups import start_groups

    cpu_backend.activate()
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    group = start_groups(ParallelConfig(), num_layers=1, seed=1).groups.tp
    of_rows = {}
    for rows in ROWS:
        passes = make_passes(rows, group)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for way in WAYS:
            passes[way]()  # the first pass still has to allocate its memory
        for pair, way in in_turn(WAYS, pairs):
            start = time.perf_counter()
            passes[way]()
            times[way].append(time.perf_counter() - start)
            print(f"{rows} rows, pair {pair}: {way} {times[way][-1]:.2f} s", flush=True)
        ratios = [own / chunked for own, chunked in zip(*times.values(), strict=True)]
        speed = {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        of_rows[str(rows)] = {"seconds": times, "speed over megatron-core's": speed}
    return {
        "command": f"python tools/bench/head.py --pairs {pairs}",
        "environment": environment(),
        "tokens": TOKENS,
        "hidden size": HIDDEN,
        "rows": of_rows,
    }


def render(results: dict[str, Any]) -> str:
    """The result file as one sentence."""
    speeds = {rows: found["speed over megatron-core's"] for rows, found in results["rows"].items()}
    parts = [
        f"{int(rows):,} rows {speed['median']:.2f} ({speed['lowest']:.2f} to {speed['highest']:.2f})"
        for rows, speed in speeds.items()
    ]
    return f"speed of head and loss over megatron-core's own: {', '.join(parts)}"


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Measure the head and its loss against megatron-core's own.")
    parser.add_argument("--pairs", type=int, default=7, help="passes of each way (default: 7)")
    return measure_and_render(parser, RESULTS, lambda options: measure(options.pairs), render)


if __name__ == "__main__":
    sys.exit(main())
