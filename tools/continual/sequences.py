"""Trains the eight made tasks one after the other, full and half, alone and with replay, and commits the results.

Run: ``python tools/continual/sequences.py`` (under two hours on two cores), or with ``--render`` to rewrite the tables
of docs/continual.md only. A second start resumes where the first was stopped. The seeds decide the order of the
training rows, which of them are replayed, and which matrices HFT trains; tasks and base model are always the same.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from majority import majority
from make_base import REPOSITORY, make_base
from make_tasks import TASKS, write_tasks

sys.path.extend(str(REPOSITORY / "tools" / name) for name in ("demo", "bench"))

from bill import environment
from launching import cpu_environment, exit_code_of, run_logged
from table import aligned, replace_table

from hft_megatron.evaluation.task_files import read_tasks

RESULTS = Path(__file__).parent / "results" / "sequences.json"
DOCUMENT = REPOSITORY / "docs" / "continual.md"
AT_ONCE = 2
"""Sequences, each of one process with one thread: two processes of one sequence would wait for each other."""
MADE_SEED, BASE_STEPS, SIZES = 1, 400, (500, 100, 100)
"""Seed and steps of the base model, and sizes of the tasks."""
TRAINING_OPTIONS = (
    *("--train-epochs", "5", "--global-batch-size", "32", "--micro-batch-size", "32", "--no-bf16"),
    *("--lr", "3e-4", "--lr-decay-style", "constant", "--adam-beta2", "0.95", "--weight-decay", "0"),
    *("--log-interval", "50", "--keep-last", "1", "--continual-batch-size", "64"),
)
"""Options as in TRACE, except for epochs, batch and rate, which are a small model's."""
SETTINGS: dict[str, tuple[str, ...]] = {
    "sequential": (),
    "replay": ("--replay-ratio", "0.1"),
    "single": ("--continual-setting", "single"),
}
WEIGHTS: dict[str, tuple[str, ...]] = {
    "full": ("--hft-ratio", "1"),
    "half, independent": ("--hft-ratio", "0.5"),
    "half, complementary": ("--hft-ratio", "0.5", "--hft-rotation", "complementary"),
}
SEEDS = (1, 2, 3)
SINGLE_SEEDS = (1,)
"""A model for each task only shows which tasks can be learned."""
STUDENT_T = 4.303
"""The 97.5 % quantile of Student's t with two degrees of freedom, those of three seeds."""
ENOUGH = 10.0
"""Points above the best constant answer from which a task counts as learned."""
PAPER = {
    ("sequential", "full"): (45.7, -10.2),
    ("sequential", "half, independent"): (51.3, -5.6),
    ("replay", "full"): (54.3, 1.4),
    ("replay", "half, independent"): (54.1, 2.1),
}
"""OP and BWT of Llama-2-7B-Chat on TRACE, as HFT's authors print them."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one sequence of tasks."""

    setting: str
    weights: str
    seed: int
    minutes: float
    """Minutes of this process, with its evaluations; incomplete where a stopped sequence was resumed."""
    scores: list[list[float | None]]
    """A row for the base and one after each task, a column for each task; None where nothing was asked."""
    general: list[float]
    """Bits per byte of texts in the base's language, a value for each row."""
    op: float | None
    bwt: float | None
    bwt_over_t_minus_1: float | None

    @property
    def own(self) -> list[float | None]:
        """The score in each task right after its own training."""
        return [row[task] for task, row in enumerate(self.scores[1:])]

    @property
    def learned(self) -> float | None:
        """The mean of ``own``: what was learned, whether it was kept or not."""
        known = [score for score in self.own if score is not None]
        return fmean(known) if len(known) == len(TASKS) else None

    @property
    def general_change(self) -> float | None:
        """Bits per byte after the last task minus the base's; None for a model per task, which has no last task."""
        return None if self.setting == "single" else self.general[-1] - self.general[0]


def planned() -> Iterator[tuple[str, str, int]]:
    """Setting, weights and seed of every sequence, all of the first seed first."""
    for seed in SEEDS:
        for setting in SETTINGS:
            for weights in WEIGHTS:
                # A model that learns one task has one round: there is nothing to be complementary to.
                if setting != "single" or (weights != "half, complementary" and seed in SINGLE_SEEDS):
                    yield setting, weights, seed


def measure(folder: Path) -> dict[str, Any]:
    """Contents of the result file; ``folder`` keeps the trained models. Raises DemoError when a training fails."""
    tasks, base = folder / "tasks", folder / "base"
    # Written last; a stopped start may have left the other files.
    if not (tasks / "tasks.yaml").exists():
        shutil.rmtree(tasks, ignore_errors=True)
        write_tasks(tasks, MADE_SEED, SIZES)
    if not (base / "model").exists():
        shutil.rmtree(base, ignore_errors=True)
        make_base(base, MADE_SEED, BASE_STEPS)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        learned = list(threads.map(lambda one: learn(folder, *one), planned()))
    bars = {task.name: majority(task) for task in read_tasks(tasks / "tasks.yaml") if task.kind == "generate"}
    return {
        "command": "python tools/continual/sequences.py",
        "environment": environment(),
        "sequences at once": AT_ONCE,
        "options": list(TRAINING_OPTIONS),
        "best constant answer": bars,
        "sequences": [asdict(one) for one in learned],
    }


def learn(folder: Path, setting: str, weights: str, seed: int) -> Outcome:
    """One sequence, or the remaining part of it. Raises DemoError when it fails."""
    name = f"{setting}_{weights.replace(', ', '_')}_seed_{seed}"
    save, done = folder / "sequences" / name, folder / "sequences" / f"{name}.json"
    if not done.exists():
        save.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "hft_megatron", "continual", "--load-hf", str(folder / "base" / "model")),
            *("--continual-tasks", str(folder / "tasks" / "sequence.yaml")),
            *("--continual-general", str(folder / "tasks" / "general.yaml")),
            *("--save", str(save), "--load", str(save), "--seed", str(seed)),
            *(*TRAINING_OPTIONS, *SETTINGS[setting], *WEIGHTS[weights]),
        ]
        print(f"{setting}, {weights}, seed {seed}: {save.with_suffix('.log')}", flush=True)
        since = time.monotonic()
        one_thread = cpu_environment({"OMP_NUM_THREADS": "1"})
        run_logged(command, environment=one_thread, folder=REPOSITORY, log=save.with_suffix(".log"), shows=False)
        matrix = json.loads((save / "matrix.json").read_text(encoding="utf-8"))
        one = of_matrix(matrix, setting, weights, seed, (time.monotonic() - since) / 60)
        done.write_text(json.dumps(asdict(one)) + "\n", encoding="utf-8")
    return Outcome(**json.loads(done.read_text(encoding="utf-8")))


def of_matrix(matrix: Mapping[str, Any], setting: str, weights: str, seed: int, minutes: float) -> Outcome:
    """The outcome from the contents of matrix.json."""
    cells = [{name: cell["value"] for name, cell in row["cells"].items()} for row in matrix["rows"]]
    summary = matrix["summary"]
    return Outcome(
        setting=setting,
        weights=weights,
        seed=seed,
        minutes=round(minutes, 2),
        scores=[[row.get(column["name"]) for column in matrix["tasks"]] for row in cells],
        general=[row[column["name"]] for row in cells for column in matrix["general"] if column["name"] in row],
        op=summary["op"],
        bwt=summary["bwt"],
        bwt_over_t_minus_1=summary["bwt_over_t_minus_1"],
    )


MEASURED: dict[str, Callable[[Outcome], float | None]] = {
    "learned": lambda one: one.learned,
    "OP": lambda one: one.op,
    "BWT (over T)": lambda one: one.bwt,
    "BWT (over T - 1)": lambda one: one.bwt_over_t_minus_1,
    "general (bits per byte)": lambda one: one.general_change,
}
BEGIN, END = "<!-- sequences -->", "<!-- /sequences -->"


def render(results: Mapping[str, Any]) -> str:
    """The tables of a result file's contents: scores, differences of half from full, and tasks one by one."""
    outcomes = [Outcome(**one) for one in results["sequences"]]
    return "\n\n".join((_scores(outcomes), _differences(outcomes), _tasks(outcomes, results["best constant answer"])))


def _scores(outcomes: Sequence[Outcome]) -> str:
    lines = [["setting", "weights", *MEASURED, "paper, 7B: OP", "BWT"]]
    for key, some in _by_method(outcomes).items():
        cells = [_spread([measure(one) for one in some], name) for name, measure in MEASURED.items()]
        lines.append([*key, *cells, *(str(number) for number in PAPER.get(key, ("", "")))])
    return aligned(lines)


def _differences(outcomes: Sequence[Outcome]) -> str:
    """Differences between runs with the same seed."""
    methods = _by_method(outcomes)
    lines = [["setting", "weights", *(f"{name}, less full" for name in MEASURED)]]
    for (setting, weights), some in methods.items():
        full = methods[setting, "full"]
        if some is full:
            continue
        cells = [
            _spread([_less(measure(one), measure(other)) for one, other in zip(some, full, strict=True)], name, "+")
            for name, measure in MEASURED.items()
        ]
        lines.append([setting, weights, *cells])
    return aligned(lines)


def _tasks(outcomes: Sequence[Outcome], bars: Mapping[str, float]) -> str:
    """The score of each task alone, beside the best score without learning it."""
    methods = _by_method(outcomes)
    single = {weights: some for (setting, weights), some in methods.items() if setting == "single"}
    lines = [["task", "base", "best constant answer", *(f"alone, {weights}" for weights in single)]]
    learned = dict.fromkeys(single, 0)
    for task, (name, bar) in enumerate(bars.items()):
        cells = [name, f"{outcomes[0].scores[0][task]:.1f}", f"{bar:.1f}"]
        for weights, some in single.items():
            scores = [score for one in some if (score := one.own[task]) is not None]
            learned[weights] += fmean(scores) >= bar + ENOUGH
            cells.append(_spread(scores, name))
        lines.append(cells)
    lines.append([f"{ENOUGH:.0f} points above it", "", "", *(f"{count} of {len(bars)}" for count in learned.values())])
    return aligned(lines)


def _by_method(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    """Outcomes in the order of SETTINGS and WEIGHTS, each with its seeds in their order."""
    found: dict[tuple[str, str], list[Outcome]] = {}
    for setting in SETTINGS:
        for weights in WEIGHTS:
            some = [one for one in outcomes if (one.setting, one.weights) == (setting, weights)]
            if some:
                assert tuple(one.seed for one in some) == (SINGLE_SEEDS if setting == "single" else SEEDS), some
                found[setting, weights] = some
    return found


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _spread(values: Sequence[float | None], name: str, sign: str = "") -> str:
    """The mean with the half width of its 95 % confidence interval over seeds; of one seed the value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ""
    digits = 3 if "bits" in name else 1
    if len(known) == 1:
        return f"{known[0]:{sign}.{digits}f}"
    half = STUDENT_T * stdev(known) / len(known) ** 0.5
    return f"{fmean(known):{sign}.{digits}f} ± {half:.{digits}f}"


def write_results(folder: Path) -> None:
    """Measures, and writes the result file, with a line for each sequence. Raises DemoError when a training fails."""
    results = measure(folder)
    sequences = ",\n".join(json.dumps(one) for one in results.pop("sequences"))
    head = json.dumps(results, indent=2).removesuffix("\n}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(f'{head},\n  "sequences": [\n{sequences}\n  ]\n}}\n', encoding="utf-8")


def write_tables() -> None:
    """Puts the tables of the result file into docs/continual.md."""
    tables = render(json.loads(RESULTS.read_text(encoding="utf-8")))
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(replace_table(text, tables, BEGIN, END), encoding="utf-8")
    print(tables)


def main() -> int:
    """Measures unless only the tables are asked for, and then rewrites those of the documentation."""
    parser = argparse.ArgumentParser(description="Train sequences of the made tasks, full and half, over three seeds.")
    parser.add_argument(
        "--folder", type=Path, default=REPOSITORY / "runs" / "continual", help="what was trained so far"
    )
    parser.add_argument("--render", action="store_true", help="only rewrite the tables, from the committed results")
    arguments = parser.parse_args()
    if arguments.render:
        return exit_code_of(write_tables)
    return exit_code_of(lambda: write_results(arguments.folder.resolve())) or exit_code_of(write_tables)


if __name__ == "__main__":
    sys.exit(main())
