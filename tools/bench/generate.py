"""Measures generation against transformers' own ``generate``, paired and alternating, into results/generate.json.

Run: ``python tools/bench/generate.py`` on a machine that does nothing else, or with ``--render`` for the line only. The
same batch of prompts of different lengths, continued greedily by as many tokens without an end, on the same cores, in
fp32 on CPU; the ids are required to be equal. Each way has a process of its own that stays.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from bill import environment
from launching import DemoError
from result_file import in_turn, measure_and_render

RESULTS = Path(__file__).parent / "results" / "generate.json"
PROMPTS, NEW_TOKENS, THREADS = 16, 32, 2
LENGTHS = range(24, 24 + 8 * PROMPTS, 8)
SHAPES = {
    "8 layers of 512, vocabulary 32,000": {
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "12 layers of 768, vocabulary 32,000": {
        "vocab_size": 32_000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
}
WAYS = ("transformers", "ours")


def make_model(folder: str, shape: dict[str, Any]) -> None:
    """Random weights, in a process of its own like everything that imports transformers or the engine here."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=512, initializer_range=0.1)
    LlamaForCausalLM(config).save_pretrained(folder)


def prompts_of(vocabulary: int) -> list[list[int]]:
    """Ids of the prompts, without padding and end tokens."""
    return [[3 + (7 * length + 31 * place) % (vocabulary - 3) for place in range(length)] for length in LENGTHS]


def by_transformers(folder: str, vocabulary: int, pipe: Connection) -> None:
    """Generates whenever it is asked to, and sends seconds and ids."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(THREADS)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = prompts_of(vocabulary)
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    while pipe.recv():
        start = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(
                padded,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=None,
                pad_token_id=0,
            )
        pipe.send((time.perf_counter() - start, found[:, longest:].tolist()))


def by_us(folder: str, vocabulary: int, pipe: Connection) -> None:
    """The same by this project."""
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from hft_megatron.config.model_shape import ModelShape, load_hf_config
    from hft_megatron.config.parallel import ParallelConfig
    from hft_megatron.engine import cpu_backend
    from hft_megatron.evaluation.forward import ModelInPlace
    from hft_megatron.evaluation.generation import GenerationRules, generate
    from hft_megatron.evaluation.saved_models import SavedModel
    from hft_megatron.parallel.groups import start_groups

    torch.set_num_threads(THREADS)
    cpu_backend.activate()
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    shape = ModelShape.from_hf_config(load_hf_config(folder), folder)
    placement = start_groups(ParallelConfig(), shape.num_layers, seed=1)
    model: ModelInPlace = SavedModel.read(folder).open(ParallelConfig(), placement, bf16=False)
    prompts = [np.array(ids, dtype=np.int32) for ids in prompts_of(vocabulary)]
    rules = GenerationRules(max_new_tokens=NEW_TOKENS)
    while pipe.recv():
        start = time.perf_counter()
        found = generate(model, _NoTokenizer(), prompts, rules, numbers=range(PROMPTS))  # type: ignore[arg-type]
        pipe.send((time.perf_counter() - start, [list(text.ids) for text in found]))


class _NoTokenizer:
    """Tokenizer for ids whose text is not needed."""

    def decode(self, ids: list[int]) -> str:
        return ""


def measure_shape(shape: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Seconds of every run by way, and the ratios within pairs."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        maker = spawn.Process(target=make_model, args=(folder, shape))
        maker.start()
        maker.join()
        pipes: dict[str, Any] = {}
        for way, work in zip(WAYS, (by_transformers, by_us), strict=True):
            pipes[way], theirs = spawn.Pipe()
            spawn.Process(target=work, args=(folder, shape["vocab_size"], theirs), daemon=True).start()
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        ids = {}
        for way in WAYS:
            pipes[way].send(True)
            _, ids[way] = pipes[way].recv()
        if ids["ours"] != ids["transformers"]:
            raise DemoError("the two ways have generated different ids")
        for pair, way in in_turn(WAYS, pairs):
            pipes[way].send(True)
            seconds, _ = pipes[way].recv()
            times[way].append(seconds)
            print(f"pair {pair}: {way} {seconds:.2f} s", flush=True)
        for pipe in pipes.values():
            pipe.send(False)
    ratios = [theirs / own for theirs, own in zip(*times.values(), strict=True)]
    tokens = PROMPTS * NEW_TOKENS
    return {
        "seconds": times,
        "tokens per second": {way: tokens / median(of_way) for way, of_way in times.items()},
        "speed over transformers'": {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)},
    }


def measure(pairs: int) -> dict[str, Any]:
    """Everything that the result file holds."""
    return {
        "command": f"python tools/bench/generate.py --pairs {pairs}",
        "environment": environment(),
        "prompts": PROMPTS,
        "prompt tokens": [LENGTHS[0], LENGTHS[-1]],
        "new tokens": NEW_TOKENS,
        "threads": THREADS,
        "models": {name: measure_shape(shape, pairs) for name, shape in SHAPES.items()},
    }


def render(results: dict[str, Any]) -> str:
    """The result file as one sentence."""
    parts = []
    for name, found in results["models"].items():
        speed, own = found["speed over transformers'"], found["tokens per second"]["ours"]
        parts.append(
            f"{name}: {own:,.0f} tokens/s, {speed['median']:.2f} ({speed['lowest']:.2f} to {speed['highest']:.2f})"
        )
    return f"generated tokens per second over transformers': {'; '.join(parts)}"


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Measure generation against transformers' generate.")
    parser.add_argument("--pairs", type=int, default=9, help="runs of each way (default: 9)")
    return measure_and_render(parser, RESULTS, lambda options: measure(options.pairs), render)


if __name__ == "__main__":
    sys.exit(main())
