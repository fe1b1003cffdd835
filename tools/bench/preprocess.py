"""Measures ``hft-megatron preprocess`` against a plain loop over transformers' tokenizer, and against itself without
the cache of words, into results/preprocess.json.

Run: ``python tools/bench/preprocess.py --data FOLDER`` on a machine that does nothing else, or with ``--render`` for
the lines only. FOLDER has ``gsm8k/train.jsonl`` (question, answer), ``text/tinystories_2mb.txt`` (stories between lines
of ``<|endoftext|>``) and ``tokenizers/llama2``. Whole commands are timed, start included, in turn; the data are
repeated, so that the start counts little; as in any long text, words of the Llama 2 tokenizer are mostly known then
(``WordCache`` in rust_pipeline.py). All write tokens and mask of all records with as many processes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bill import DEMO, environment
from result_file import in_turn, measure_and_render

REPOSITORY = DEMO.parents[1]
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "preprocess.json"
PLAIN, OURS, WITHOUT = WAYS = "plain loop", "hft-megatron preprocess", "without the cache of words"
COMMAND = "import sys; from hft_megatron.cli.entry import main; sys.exit(main(['preprocess', *sys.argv[1:]]))"
NO_WORDS = "from hft_megatron.data import huggingface_tokenizer as h; h.word_pattern = lambda _: None"
CODE = {OURS: COMMAND, WITHOUT: f"{NO_WORDS}; {COMMAND}"}  # workers are forked, so that they have no words either
REPEATS = {"GSM8K": 24, "TinyStories": 60}
SEPARATOR = "<|endoftext|>"


def records(data: Path, name: str) -> Iterator[dict[str, str]]:
    """The records of a data set."""
    if name == "GSM8K":
        for line in (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield {"prompt": row["question"] + "\n", "completion": row["answer"]}
        return
    for story in (data / "text" / "tinystories_2mb.txt").read_text(encoding="utf-8").split(f"{SEPARATOR}\n"):
        if story.strip():
            yield {"text": story.strip("\n")}


def run_once(way: str, source: Path, data: Path, workers: int) -> float:
    """Seconds of one command."""
    tokenizer = str(data / "tokenizers" / "llama2")
    with tempfile.TemporaryDirectory(prefix="preprocess-") as name:
        prefix = f"{name}/out"
        if way == PLAIN:
            words = [str(HERE / "plain_tokenize.py"), str(source), prefix, tokenizer, str(workers)]
        else:
            words = ["-c", CODE[way], "--input", str(source), "--output-prefix", prefix]
            words += ["--tokenizer-model", tokenizer, "--tokenizer-type", "HuggingFaceTokenizer", "--append-eod"]
            words += ["--workers", str(workers)]
        variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TOKENIZERS_PARALLELISM": "false"}
        begin = time.monotonic()
        subprocess.run([sys.executable, *words], env=variables, check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - begin


def measure(data: Path, workers: int, pairs: int) -> dict[str, Any]:
    """Everything that the result file holds."""
    sets = {}
    with tempfile.TemporaryDirectory(prefix="preprocess-") as folder:
        for name, repeats in REPEATS.items():
            lines = [json.dumps(record) + "\n" for record in records(data, name)] * repeats
            source = Path(folder) / f"{name}.jsonl"
            source.write_text("".join(lines), encoding="utf-8")
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            for turn, way in in_turn(WAYS, pairs):
                print(f"{name}, turn {turn}: {way}", flush=True)
                rates[way].append(len(lines) / run_once(way, source, data, workers))
            sets[name] = {
                "documents": len(lines),
                "documents per second": rates,
                "ratio": _ratio(rates[OURS], rates[PLAIN]),
                "ratio to without the cache": _ratio(rates[OURS], rates[WITHOUT]),
            }
    return {
        "command": f"python tools/bench/preprocess.py --data FOLDER --workers {workers} --pairs {pairs}",
        "environment": {**environment(), **{name: version(name) for name in ("transformers", "tokenizers")}},
        "tokenizer": "Llama 2, tokenizer.json",
        "workers": workers,
        "data": sets,
    }


def _ratio(ours: list[float], others: list[float]) -> dict[str, float]:
    ratios = [one / other for one, other in zip(ours, others, strict=True)]
    return {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def render(results: dict[str, Any]) -> str:
    """The result file as a sentence for each data set."""
    lines = []
    for name, found in results["data"].items():
        plain, ours = (median(found["documents per second"][way]) for way in (PLAIN, OURS))
        ratio, cached = found["ratio"], found["ratio to without the cache"]
        lines.append(
            f"{name}: {ours:,.0f} documents/s with {results['workers']} workers, plain loop {plain:,.0f}: "
            f"{ratio['median']:.2f} times as many ({ratio['lowest']:.2f} to {ratio['highest']:.2f}); "
            f"the cache of words makes it {cached['median']:.2f} times as many ({cached['lowest']:.2f} to "
            f"{cached['highest']:.2f})"
        )
    return "\n".join(lines)


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Measure preprocessing against a plain loop.")
    parser.add_argument("--data", type=Path, help="folder with the data sets and the tokenizer")
    parser.add_argument("--workers", type=int, default=2, help="processes of both (default: 2)")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each way (default: 3)")

    def asked(options: argparse.Namespace) -> dict[str, Any]:
        if options.data is None:
            parser.error("--data is missing")
        return measure(options.data, options.workers, options.pairs)

    return measure_and_render(parser, RESULTS, asked, render)


if __name__ == "__main__":
    sys.exit(main())
