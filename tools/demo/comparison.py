"""Compares half with full fine-tuning on one prepared folder: the same script, options, data and seed, except the
ratio.

Both are measured at the same number of steps, and at the first evaluation where the new task is learned.
"""

import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import settings
from launching import cpu_environment, run_logged
from prepare import DemoFolder, new_task, old_knowledge

SCRIPT = settings.REPOSITORY / "examples" / "finetune_llama_hft.sh"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to fine-tune."""

    name: str
    ratio: str
    longest: int
    """Steps after which an unlearned task is given up."""


HALF = Method(name="HFT", ratio="0.5", longest=settings.LONGEST_FINE_TUNING)
FULL = Method(name="full", ratio="1", longest=settings.FINE_TUNING_STEPS)
METHODS = (HALF, FULL)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Shares of exact matches after some steps, and the model's folder."""

    step: int
    new_task: float
    old_knowledge: float
    model: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one method on one seed. Bytes and times are those of one rank, by its metrics."""

    method: str
    seed: int
    evaluations: tuple[Evaluation, ...]
    step_ms: float
    """Median over the run's steps, TP 2."""
    optimizer_bytes: int
    """Master weights, if there are any, and both moments."""
    gradient_bytes: int
    wire_bytes: int
    """Given to reduce-scatter and all-gather per step at TP 2 x DP 2."""

    @property
    def at_equal_steps(self) -> Evaluation:
        """The evaluation after ``FINE_TUNING_STEPS`` steps."""
        return next(one for one in self.evaluations if one.step == settings.FINE_TUNING_STEPS)

    @property
    def at_equal_skill(self) -> Evaluation | None:
        """The first evaluation with the new task learned; None when there is none."""
        return next((one for one in self.evaluations if one.new_task >= settings.ENOUGH), None)

    def to_dict(self) -> dict[str, Any]:
        """The outcome in JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Outcome":
        """The inverse of ``to_dict``."""
        return cls(**{**values, "evaluations": tuple(Evaluation(**one) for one in values["evaluations"])})


def compare(demo: DemoFolder, output: Path, seed: int) -> list[Outcome]:
    """Fine-tune ``demo``'s model with every method into ``output``/<method>. Raises DemoError when a training fails."""
    return [_run_method(demo, output / method.name, method, seed) for method in METHODS]


def _run_method(demo: DemoFolder, folder: Path, method: Method, seed: int) -> Outcome:
    folder.mkdir(parents=True)
    evaluations: list[Evaluation] = []
    run = folder / "run"
    for step in range(settings.EVALUATION_INTERVAL, method.longest + 1, settings.EVALUATION_INTERVAL):
        model = folder / f"model_{step:04d}"
        _fine_tune(demo, method, seed, step, run, folder, export=model)
        evaluations.append(evaluate(model, step))
        one = evaluations[-1]
        print(
            f"  {method.name} after {step} steps: new task {one.new_task:.1%}, old knowledge {one.old_knowledge:.1%}",
            flush=True,
        )
        if step >= settings.FINE_TUNING_STEPS and any(one.new_task >= settings.ENOUGH for one in evaluations):
            break
    records = read_metrics(run / "metrics.jsonl")
    wire = folder / "wire"
    _fine_tune(demo, method, seed, 1, wire, folder, ranks=2 * settings.RANKS)
    sent = read_metrics(wire / "metrics.jsonl")[-1]
    return Outcome(
        method=method.name,
        seed=seed,
        evaluations=tuple(evaluations),
        step_ms=statistics.median(record["elapsed time per iteration (ms)"] for record in records),
        optimizer_bytes=records[-1]["optimizer bytes"],
        gradient_bytes=records[-1]["gradient buffer bytes"],
        wire_bytes=sent["reduce-scatter bytes"] + sent["all-gather bytes"],
    )


def _fine_tune(
    demo: DemoFolder,
    method: Method,
    seed: int,
    steps: int,
    run: Path,
    folder: Path,
    *,
    export: Path | None = None,
    ranks: int = settings.RANKS,
) -> None:
    """Train ``run`` up to ``steps`` with the example script, resuming from its last checkpoint."""
    command = ["bash", str(SCRIPT), *settings.FINE_TUNING_OPTIONS]
    command += ["--hft-ratio", method.ratio, "--seed", str(seed), "--train-iters", str(steps)]
    command += ["--micro-batch-size", str(settings.FINE_TUNING_BATCH * settings.RANKS // ranks)]
    if export is not None:
        command += ["--save-hf", str(export)]
    additions = {
        "MODEL": str(demo.model),
        "DATA": str(demo.train_data),
        "SAVE": str(run),
        "PYTHON": sys.executable,
        "TP": str(settings.RANKS),
        "GPUS_PER_NODE": str(ranks),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
    }
    run_logged(command, environment=cpu_environment(additions), folder=folder, log=folder / "training.log")


def evaluate(model: Path, step: int) -> Evaluation:
    """Score an exported folder on both kinds of questions; ``step`` is its number of fine-tuning steps."""
    # Imported here because transformers takes seconds, and a mistake in the options should not wait for it.
    from scoring import ExportedModel, score_chat, score_statements

    exported = ExportedModel.load(model)
    return Evaluation(
        step=step,
        new_task=score_chat(exported, new_task().questions).share,
        old_knowledge=score_statements(exported, old_knowledge().questions).share,
        model=model.name,
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged training steps of a run, in order; validations are left out."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "lm loss" in record]
