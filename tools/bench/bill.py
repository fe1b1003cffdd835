"""Measures the bill of half against full fine-tuning, paired and alternating, and commits it to results/bill.json.

Run: ``python tools/bench/bill.py`` on a machine that does nothing else, or with ``--render`` to print the table only.
Every run is ``torchrun ... -m hft_megatron sft`` as a person would start it, with random weights and the same data and
seed; each run's own bill.json is summarised. Two ranks, DP 2 over gloo, in the machine's faster data type.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parents[1] / "demo"
sys.path.insert(0, str(DEMO))  # its programs lie beside each other and are no package

import settings  # noqa: E402
from bill_summary import METHODS, render, summarise  # noqa: E402
from launching import cpu_environment, run_logged  # noqa: E402
from result_file import in_turn, measure_and_render  # noqa: E402
from seeds import processor_name  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "bill.json"
RANKS = 2
PIECES = 1024
"""Vocabulary of the tokenizer; the models' may be larger."""
ROW_CHARACTERS = 4000
"""Enough for more than 512 tokens, so that every example fills its sequence."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, and the size of its step."""

    name: str
    model: tuple[str, ...]
    sequence: int
    sequences_per_rank: int

    @property
    def tokens(self) -> int:
        """Tokens per rank and step."""
        return self.sequence * self.sequences_per_rank


WORKLOADS = (
    Workload(
        name="demo",
        model=(*settings.MODEL_OPTIONS, "--vocab-size", str(settings.VOCABULARY)),
        sequence=64,
        sequences_per_rank=settings.PRETRAINING_BATCH // RANKS,
    ),
    Workload(
        name="98M",
        model=(
            *("--num-layers", "12"),
            *("--hidden-size", "768"),
            *("--ffn-hidden-size", "2048"),
            *("--num-attention-heads", "12"),
            *("--max-position-embeddings", "512"),
            *("--vocab-size", "16384"),
        ),
        sequence=512,
        sequences_per_rank=1,
    ),
)
OVERLAPS = {"off": (), "on": ("--overlap-grad-reduce", "--overlap-param-gather")}


def write_data(folder: Path) -> None:
    """``folder/train.jsonl``, and a tokenizer for it: the manual that comes with Python, real text on every machine."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    chunks = [text[start : start + ROW_CHARACTERS] for start in range(0, len(text), ROW_CHARACTERS)][:-1]
    # A space between prompt and answer has changed sides since the version that peers.py compares with.
    rows = [{"prompt": "Go on:", "completion": chunk.lstrip()} for chunk in chunks]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train_tokenizer(folder, text, PIECES)


def train_tokenizer(folder: Path, text: str, pieces: int) -> None:
    """``folder/tokenizer.model``, as LLaMA's are made."""
    import sentencepiece

    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.splitlines()),
            model_writer=file,
            vocab_size=pieces,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            num_threads=1,
            minloglevel=2,
        )


def run_once(
    folder: Path, workload: Workload, options: Sequence[str], steps: int, *, method: str = "sft"
) -> tuple[Any, list[dict[str, Any]]]:
    """bill.json and the lines of metrics.jsonl of one run. Raises DemoError when it fails."""
    save = folder / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)),
        *("-m", "hft_megatron", method, *workload.model, *options),
        *("--train-iters", str(steps), "--lr", "1e-4", "--lr-decay-style", "constant"),
        *("--seq-length", str(workload.sequence), "--long-examples", "truncate"),
        *("--micro-batch-size", str(workload.sequences_per_rank)),
        *("--train-data-path", str(folder / "train.jsonl"), "--tokenizer-model", str(folder / "tokenizer.model")),
        *("--save", str(save)),
    ]
    threads = str(max(1, (os.cpu_count() or 1) // RANKS))
    variables = cpu_environment({"OMP_NUM_THREADS": threads, "PYTHONPATH": str(settings.REPOSITORY)})
    run_logged(command, environment=variables, folder=settings.REPOSITORY, log=folder / "runs.log")
    bill = json.loads((save / "bill.json").read_text(encoding="utf-8"))
    metrics = [json.loads(line) for line in (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.rmtree(save)  # its checkpoint would fill the disk, and the next run has other weights
    return bill, metrics


def measure(workloads: Iterable[Workload], overlaps: Iterable[str], pairs: int, steps: int) -> dict[str, Any]:
    """Everything that the result file holds. Raises DemoError when a run fails."""
    configurations = []
    overlaps = list(overlaps)
    with tempfile.TemporaryDirectory(prefix="bill-") as name:
        folder = Path(name)
        write_data(folder)
        for workload in workloads:
            for overlap in overlaps:
                print(f"{workload.name}, overlap {overlap}", flush=True)
                bills: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
                for _, method in in_turn(METHODS, pairs):
                    words = (*OVERLAPS[overlap], "--hft-ratio", METHODS[method])
                    bills[method].append(run_once(folder, workload, words, steps)[0])
                configurations.append(
                    {
                        "model": workload.name,
                        "overlap": overlap,
                        "tokens per rank and step": workload.tokens,
                        "options": [*workload.model, *OVERLAPS[overlap]],
                        **summarise(bills),
                    }
                )
    return {
        "command": f"python tools/bench/bill.py --pairs {pairs} --steps {steps}",
        "pairs": pairs,
        "steps": steps,
        "environment": environment(),
        "configurations": configurations,
    }


def environment() -> dict[str, Any]:
    """Machine and versions that the figures depend on."""
    return {
        "cores": os.cpu_count(),
        "processor": processor_name(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "megatron-core")},
    }


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Measure the bill of half against full fine-tuning.")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each method (default: 3)")
    parser.add_argument("--steps", type=int, default=6, help="steps of a run; the first two are not timed (default: 6)")
    parser.add_argument("--model", choices=[one.name for one in WORKLOADS], help="only this one (default: all)")
    parser.add_argument("--overlap", choices=list(OVERLAPS), help="only this one (default: both)")

    def asked(options: argparse.Namespace) -> dict[str, Any]:
        workloads = [one for one in WORKLOADS if options.model in (None, one.name)]
        overlaps = [one for one in OVERLAPS if options.overlap in (None, one)]
        return measure(workloads, overlaps, options.pairs, options.steps)

    return measure_and_render(parser, RESULTS, asked, render)


if __name__ == "__main__":
    sys.exit(main())
