"""Compares ``hft-megatron plan --time`` with real steps, into results/step_time.json.

Run: ``python tools/bench/step_time.py`` on a machine that does nothing else, or with ``--render`` for the tables only;
less than eight minutes on two cores. Before each set of runs ``machine_rates.py`` measures the rates of both ranks
working together, at the shapes of these runs; the estimate uses only those rates. The runs are those of ``bill.py``:
the product as a person would start it, with the model of 98 M parameters in fp32 over gloo.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bill import RANKS, WORKLOADS, Workload, environment, run_once, write_data
from bill_summary import METHODS
from launching import cpu_environment, run_logged
from result_file import in_turn, measure_and_render
from settings import REPOSITORY
from table import aligned

from hft_megatron.cli.plan import PlanOptions
from hft_megatron.config.loading import load_options
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.validation import shape_of
from hft_megatron.costs.part_times import Device
from hft_megatron.costs.rank_costs import CostModel
from hft_megatron.costs.rank_memory import MicroBatch
from hft_megatron.costs.step_time import StepTime, StepTimeModel
from hft_megatron.hft.plan import make_plan
from hft_megatron.hft.units import ATTENTION_IN, ATTENTION_OUT, LM_HEAD_NAME, MLP_IN, MLP_OUT
from hft_megatron.model.parameter_names import whole_shape

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "step_time.json"
DOCUMENT = REPOSITORY / "docs" / "scale.md"
BEGIN, END = "<!-- step-time-tables -->", "<!-- /step-time-tables -->"
MEMORY_ELEMENTS = 64_000_000
"""Elements of the passes over memory: more than a cache holds."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A layout of two ranks, and its batch."""

    exchange: str
    """Ranks that send: ``data``, ``tensor`` or ``pipeline``."""
    sequence: int
    micro_batches: int
    steps: int
    """Steps of a run, of which the first two are not timed."""

    @property
    def options(self) -> tuple[str, ...]:
        """Options of every run."""
        replicas = RANKS if self.exchange == "data" else 1
        layout = () if self.exchange == "data" else (f"--{self.exchange}-model-parallel-size", str(RANKS))
        return (*layout, "--global-batch-size", str(replicas * self.micro_batches), "--no-bf16")


SETTINGS: Mapping[str, Setting] = {
    "DP 2, 128 tokens": Setting(exchange="data", sequence=128, micro_batches=1, steps=8),
    "DP 2, 512 tokens": Setting(exchange="data", sequence=512, micro_batches=1, steps=6),
    "DP 2, 4 x 512 tokens": Setting(exchange="data", sequence=512, micro_batches=4, steps=4),
    "TP 2, 512 tokens": Setting(exchange="tensor", sequence=512, micro_batches=1, steps=6),
    "PP 2, 4 x 512 tokens": Setting(exchange="pipeline", sequence=512, micro_batches=4, steps=4),
}
MODEL = next(one for one in WORKLOADS if one.name == "98M").model


def measure(settings: Mapping[str, Setting], model: Sequence[str], pairs: int) -> dict[str, Any]:
    """Everything that the result file holds. Raises DemoError when a run fails."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="step-time-") as name:
        folder = Path(name)
        write_data(folder)
        for label, setting in settings.items():
            print(label, flush=True)
            options = planned(setting, model)
            workload = Workload(name=label, model=tuple(model), sequence=setting.sequence, sequences_per_rank=1)
            rates = rates_here(folder, options, setting)
            measured: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
            for _, method in in_turn(METHODS, pairs):
                words = (*setting.options, "--hft-ratio", METHODS[method])
                measured[method].append(milliseconds(run_once(folder, workload, words, setting.steps)[0]))
            estimated = estimates(options, setting, rates)
            found[label] = compared(measured, estimated) | {"rates": rates, "options": list(setting.options)}
    return {
        "command": f"python tools/bench/step_time.py --pairs {pairs}",
        "pairs": pairs,
        "model": list(model),
        "environment": environment(),
        "settings": found,
    }


def planned(setting: Setting, model: Sequence[str]) -> PlanOptions:
    """The options of ``hft-megatron plan`` for a setting."""
    return load_options(PlanOptions, [*model, *setting.options, "--seq-length", str(setting.sequence)])


def _shape(options: PlanOptions) -> ModelShape:
    shape = shape_of(options.model)
    assert shape is not None, "the models here have a vocabulary"
    return shape


def rates_here(folder: Path, options: PlanOptions, setting: Setting) -> dict[str, float]:
    """The rates that ``machine_rates.py`` measures, by the names of ``Device``."""
    shape, tensor_size = _shape(options), options.parallel.tensor_model_parallel_size

    def local(module: str, *, cut: int) -> tuple[int, ...]:
        return tuple(
            size // tensor_size if number == cut else size
            for number, size in enumerate(whole_shape(f"model.layers.0.{module}", shape))
        )

    rows, columns = whole_shape(LM_HEAD_NAME, shape)
    job = {
        "layer": [
            *(local(module, cut=0) for module in (*ATTENTION_IN, *MLP_IN)),
            *(local(module, cut=1) for module in (ATTENTION_OUT, MLP_OUT)),
        ],
        "layers": shape.num_layers,
        "head": (rows // tensor_size, columns),
        "tokens": setting.sequence,
        "heads": shape.num_attention_heads // tensor_size,
        "channels": shape.kv_channels,
        "memory_elements": MEMORY_ELEMENTS,
        "exchange": setting.exchange,
        "buffer_elements": shape.parameter_count(),
        "message_elements": setting.sequence * shape.hidden_size,
    }
    output = folder / "rates.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)),
        *(str(HERE / "machine_rates.py"), json.dumps(job), str(output)),
    ]
    variables = cpu_environment({"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)})
    run_logged(command, environment=variables, folder=REPOSITORY, log=folder / "runs.log")
    rates: dict[str, float] = json.loads(output.read_text(encoding="utf-8"))["rates"]
    return rates


def estimates(options: PlanOptions, setting: Setting, rates: Mapping[str, float]) -> dict[str, StepTime]:
    """A step of each method by the formula."""
    shape = _shape(options)
    model = StepTimeModel(
        costs=CostModel(shape=shape, parallel=options.parallel, world_size=RANKS, bf16=False),
        training=options.as_run.training,
        micro_batch=MicroBatch(sequences=1, seq_length=setting.sequence),
        micro_batches=setting.micro_batches,
        device=Device(
            **rates,
            network_bandwidth=rates["node_bandwidth"],
            devices_per_node=RANKS,
            sends_beside_compute=False,  # gloo's threads have no cores of their own
        ),
    )
    plan = make_plan(shape, options.hft, default_seed=options.training.seed, round=0)
    return {"HFT": model.of(plan.trains), "full": model.of(lambda unit: True)}


def milliseconds(bill: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of a run's step and its sections: means over ranks and timed steps."""
    ranks = [rank["milliseconds"] for rank in bill["ranks"]]
    return {part: fmean(rank[part] for rank in ranks) for part in ranks[0]}


def compared(
    measured: Mapping[str, Sequence[Mapping[str, float]]], estimated: Mapping[str, StepTime]
) -> dict[str, Any]:
    """Measured and estimated times, and the estimate's relative error, for each method and for half over full."""
    found: dict[str, Any] = {}
    for method, runs in measured.items():
        means = {part: fmean(run[part] for run in runs) for part in runs[0]}
        step = 1e3 * estimated[method].total
        found[method] = {
            "measured (ms)": {part: round(value, 1) for part, value in means.items()},
            "estimated (ms)": {
                "step": round(step, 1),
                **{part: round(1e3 * value, 1) for part, value in asdict(estimated[method]).items()},
            },
            "error": round(step / means["step"] - 1, 4),
        }
    real, formula = (
        found["HFT"][kind]["step"] / found["full"][kind]["step"] for kind in ("measured (ms)", "estimated (ms)")
    )
    found["HFT / full"] = {
        "measured": round(real, 4),
        "estimated": round(formula, 4),
        "error": round(formula / real - 1, 4),
    }
    return found


def render(results: Mapping[str, Any]) -> str:
    """Two Markdown tables: steps and errors, and the rates behind the estimate."""
    steps = [["measured / estimated", "HFT (ms)", "error", "full (ms)", "error", "HFT / full", "error"]]
    rates = [["on each rank", "GFLOP/s", "of weight gradients", "of attention", "memory (GB/s)", "sent (GB/s)"]]
    for label, one in results["settings"].items():
        row = [label]
        for method in METHODS:
            real, formula = (one[method][kind]["step"] for kind in ("measured (ms)", "estimated (ms)"))
            row += [f"{real:,.0f} / {formula:,.0f}", _percent(one[method]["error"])]
        ratio = one["HFT / full"]
        steps.append([*row, f"{ratio['measured']:.2f} / {ratio['estimated']:.2f}", _percent(ratio["error"])])
        found = one["rates"]
        rates.append(
            [
                label,
                *(f"{1e3 * found[name]:.1f}" for name in ("tflops", "weight_gradient_tflops", "attention_tflops")),
                *(f"{found[name]:.2f}" for name in ("memory_bandwidth", "node_bandwidth")),
            ]
        )
    return f"{aligned(steps)}\n\n{aligned(rates)}"


def _percent(error: float) -> str:
    return f"{100 * error:+.0f} %"


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Compare estimated with measured step times.")
    parser.add_argument("--pairs", type=int, default=1, help="runs of each method (default: 1)")
    parser.add_argument("--setting", action="append", choices=list(SETTINGS), help="only this one (default: all)")

    def asked(options: argparse.Namespace) -> dict[str, Any]:
        chosen = options.setting or SETTINGS
        return measure({name: SETTINGS[name] for name in chosen}, MODEL, options.pairs)

    return measure_and_render(parser, RESULTS, asked, render)


if __name__ == "__main__":
    sys.exit(main())
