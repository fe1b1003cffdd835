"""Estimates steps of published models on up to 1,024 devices, by formula alone, into results/scale.json.

Run: ``python tools/bench/scale.py``, in about a minute on any machine, or with ``--render`` to print the tables only,
which are in docs/scale.md. Nothing here is measured. For half and for full fine-tuning the fastest layout that fits
is searched among TP up to 8, every PP of a power of two, and the least recomputation that fits.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parents[1] / "demo"
sys.path.insert(0, str(DEMO))  # its programs lie beside each other and are no package

from result_file import measure_and_render  # noqa: E402
from settings import REPOSITORY  # noqa: E402
from table import aligned  # noqa: E402

from hft_megatron.config.derived import data_parallel_size  # noqa: E402
from hft_megatron.config.hft import HFTConfig  # noqa: E402
from hft_megatron.config.model_shape import ModelShape  # noqa: E402
from hft_megatron.config.parallel import ParallelConfig, proposed_split  # noqa: E402
from hft_megatron.config.training import TrainingConfig  # noqa: E402
from hft_megatron.costs.part_times import Device  # noqa: E402
from hft_megatron.costs.rank_costs import CostModel  # noqa: E402
from hft_megatron.costs.rank_memory import MemoryModel, MicroBatch  # noqa: E402
from hft_megatron.costs.step_time import StepTimeModel, Trains  # noqa: E402
from hft_megatron.hft.plan import make_plan  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "scale.json"
DOCUMENT = REPOSITORY / "docs" / "scale.md"
BEGIN, END = "<!-- scale-tables -->", "<!-- /scale-tables -->"
_LLAMA2 = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "num_key_value_heads": 8}
_7B = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32}
_70B = {"num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 28672}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "Llama-2-7B": {**_LLAMA2, **_7B, "intermediate_size": 11008},
    "Llama-2-13B": {
        **_LLAMA2,
        "num_hidden_layers": 40,
        "hidden_size": 5120,
        "num_attention_heads": 40,
        "intermediate_size": 13824,
    },
    "Llama-2-70B": {**_LLAMA2, **_70B, "num_key_value_heads": 8},
    "Llama-3-8B": {**_LLAMA3, **_7B, "intermediate_size": 14336},
    "Llama-3-70B": {**_LLAMA3, **_70B},
}
"""The keys of their config.json that matter here."""
WORLDS = (8, 64, 256, 1024)
SEQUENCE, SEQUENCES = 4096, 1024
"""Length of a sequence, and sequences of a step on all devices."""
DATA_SHEET = {"tflops": 989.0, "memory_bandwidth": 3350.0, "node_bandwidth": 450.0, "network_bandwidth": 50.0}
"""NVIDIA H100 SXM: dense bf16, HBM3, NVLink in one direction; and a link of 400 Gb/s to the network for each device."""
SHARES = {"tflops": 0.6, "memory_bandwidth": 0.8, "node_bandwidth": 0.8, "network_bandwidth": 0.8}
"""Shares assumed to be sustained. No GPU has confirmed them for this project."""
ROOM = 74 * 10**9
"""Bytes of 80 GB: CUDA, NCCL's buffers and the allocator's gaps take the rest, by assumption."""
_UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
RECOMPUTATIONS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": _UNIFORM,
}
"""From the fastest to the one that needs least memory."""
RECOMPUTED = {"none": "nothing", "selective": "attention", "full": "layers"}
"""Names of the recomputed parts."""
HALF, FULL = "half", "full"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A layout with the recomputation that it needs to fit, and its step time."""

    tensor: int
    pipeline: int
    data: int
    recomputation: str
    """The least recomputation that fits."""
    memory_gb: float
    step_s: float

    @property
    def words(self) -> str:
        """``TP 2 x PP 1 x DP 4``, and the recomputation if there is any."""
        again = "" if self.recomputation == "none" else f", {RECOMPUTED[self.recomputation]} recomputed"
        return f"{self.layout}{again}"

    @property
    def layout(self) -> str:
        """The words without the recomputation."""
        return f"TP {self.tensor} x PP {self.pipeline} x DP {self.data}"


def device() -> Device:
    """A device with the assumed rates."""
    sustained = {name: SHARES[name] * peak for name, peak in DATA_SHEET.items()}
    return Device(**sustained, devices_per_node=8, sends_beside_compute=True)


def layouts(shape: ModelShape, world_size: int) -> Iterator[ParallelConfig]:
    """The searched layouts, with overlapped reduction and gathering, and sequence parallelism beside TP."""
    for tensor in (1, 2, 4, 8):
        for pipeline in (2**exponent for exponent in range(shape.num_layers.bit_length())):
            replicas, rest = divmod(world_size, tensor * pipeline)
            if rest or SEQUENCES % replicas or pipeline > shape.num_layers:
                continue
            plain = ParallelConfig(
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                sequence_parallel=tensor > 1,
                overlap_grad_reduce=True,
                overlap_param_gather=True,
            )
            yield proposed_split(plain, shape.num_layers)


def choices(shape: ModelShape, world_size: int, trains: Trains) -> Iterator[Choice]:
    """Yields every layout that fits."""
    for parallel in layouts(shape, world_size):
        for name, words in RECOMPUTATIONS.items():
            choice = fitting(shape, parallel, world_size, trains, name, TrainingConfig(**words))
            if choice is not None:
                yield choice
                break


def fitting(
    shape: ModelShape, parallel: ParallelConfig, world_size: int, trains: Trains, name: str, training: TrainingConfig
) -> Choice | None:
    """A layout under the recomputation of that name, or None where it doesn't fit."""
    costs = CostModel(shape=shape, parallel=parallel, world_size=world_size, bf16=True)
    batch, count = MicroBatch(sequences=1, seq_length=SEQUENCE), SEQUENCES // costs.data_size
    memory = MemoryModel(costs=costs, training=training, micro_batch=batch, micro_batches=count).largest(trains)
    if memory.total > ROOM:
        return None
    model = StepTimeModel(costs=costs, training=training, micro_batch=batch, micro_batches=count, device=device())
    return Choice(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        data=data_parallel_size(parallel, world_size),
        recomputation=name,
        memory_gb=round(memory.total / 1e9, 1),
        step_s=round(model.of(trains).total, 4),
    )


def one_case(name: str, world_size: int) -> dict[str, Any]:
    """A model on a number of devices: the fastest layouts, and those that only half fits."""
    shape = ModelShape.from_hf_config(MODELS[name], source=name)
    plan = make_plan(shape, HFTConfig(), default_seed=TrainingConfig.seed, round=0)
    ways: Mapping[str, Trains] = {HALF: plan.trains, FULL: lambda unit: True}
    found = {way: list(choices(shape, world_size, trains)) for way, trains in ways.items()}
    best = {way: min(some, key=lambda one: one.step_s, default=None) for way, some in found.items()}
    case: dict[str, Any] = {"model": name, "devices": world_size}
    for way, choice in best.items():
        case[way] = None if choice is None else asdict(choice) | {"words": choice.words}
    of_full = {(one.tensor, one.pipeline): one for one in found[FULL]}
    chosen = best[FULL]
    same = (one.step_s for one in found[HALF] if chosen is not None and one.words == chosen.words)
    case["half on full's layout (s)"] = next(same, None)
    case["only half fits"] = [one.words for one in found[HALF] if (one.tensor, one.pipeline) not in of_full]
    case["full recomputes more"] = [
        f"{one.layout}: {RECOMPUTED[other.recomputation]}, half {RECOMPUTED[one.recomputation]}"
        for one in found[HALF]
        if (other := of_full.get((one.tensor, one.pipeline))) and other.recomputation != one.recomputation
    ]
    return case


def estimate(models: Sequence[str], worlds: Sequence[int]) -> dict[str, Any]:
    """Everything that the result file holds."""
    return {
        "command": "python tools/bench/scale.py",
        "measured": False,
        "data sheet": DATA_SHEET,
        "assumed shares": SHARES,
        "room (bytes)": ROOM,
        "sequences": SEQUENCES,
        "sequence": SEQUENCE,
        "cases": [one_case(name, world_size) for name in models for world_size in worlds],
    }


def render(results: Mapping[str, Any]) -> str:
    """Two Markdown tables: the fastest layouts, and those that only half fits."""
    tokens = results["sequences"] * results["sequence"]
    steps = [["model", "devices", "half", "s", "tokens/s", "full", "s", "tokens/s", "half / full", "on full's layout"]]
    fits = [["model", "devices", "only half fits", "full recomputes more"]]
    for case in results["cases"]:
        row = [case["model"], f"{case['devices']:,}"]
        for way in (HALF, FULL):
            choice = case[way]
            row += (
                ["none fits", "", ""]
                if choice is None
                else [choice["words"], f"{choice['step_s']:.2f}", f"{tokens / choice['step_s']:,.0f}"]
            )
        half, full, same = case[HALF], case[FULL], case["half on full's layout (s)"]
        row.append(f"{half['step_s'] / full['step_s']:.2f}" if half and full else "")
        row.append(f"{same / full['step_s']:.2f}" if same and full else "")
        steps.append(row)
        lists = (case["only half fits"], case["full recomputes more"])
        if any(lists):
            fits.append([*row[:2], *("; ".join(one) for one in lists)])
    return f"{aligned(steps)}\n\n{aligned(fits)}"


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Estimate steps of published models on many devices.")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="only this one (default: all)")
    parser.add_argument("--devices", action="append", type=int, help="only so many (default: 8 to 1,024)")

    def asked(options: argparse.Namespace) -> dict[str, Any]:
        return estimate(options.model or list(MODELS), options.devices or WORLDS)

    return measure_and_render(parser, RESULTS, asked, render)


if __name__ == "__main__":
    sys.exit(main())
