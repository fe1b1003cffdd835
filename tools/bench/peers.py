"""Compares a step of half and full fine-tuning with alternatives that people use, and commits it to results/peers.json.

Run: ``python tools/bench/peers.py`` on a machine that does nothing else, or with ``--render`` to print the tables only.
A LLaMA of 98 M parameters on two ranks, DP 2 where nothing else is said, with one thread each over gloo (``--device
cuda``: a rank for each GPU over NCCL). All trainers of a set are processes of their own that hold the same weights and
take one step of the same batch in every round, in an order that changes; ratios within rounds are compared.
``full at 9d3f35c`` is this project before its collectives and its AdamW were changed.
"""

import argparse
import json
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bill import environment, write_data
from launching import DemoError, cpu_environment
from peers_tables import BEFORE, USUAL_LAYOUT, picture, render
from result_file import measure_and_render

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RESULTS = HERE / "results" / "peers.json"
MODEL = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 16384,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}
WARM_UP_ROUNDS = 2
AGREE = 1e-5
"""The largest relative difference of first losses."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of a step on a rank."""

    sequence: int
    micro_batches: int


WORKS = {
    "128": Work(sequence=128, micro_batches=1),
    "512": Work(sequence=512, micro_batches=1),
    "4 x 512": Work(sequence=512, micro_batches=4),
}
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
LAYOUTS: Mapping[str, Mapping[str, int | bool]] = {
    USUAL_LAYOUT: {},
    "TP 2": {"tensor_model_parallel_size": 2},
    "TP 2 + SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP 2": {"pipeline_model_parallel_size": 2},
}
"""Layouts of the two ranks: the product's options, which are stock megatron-core's too."""


def ours(ratio: str, *options: str, before: bool = False) -> dict[str, Any]:
    """The product."""
    return {"trainer": "ours", "words": ["--hft-ratio", ratio, *options], "before": before}


def theirs(sharding: str, *, frozen: bool, fused: bool = True) -> dict[str, Any]:
    """transformers."""
    return {"trainer": "transformers", "sharding": sharding, "frozen": frozen, "fused": fused}


TRAINERS: Mapping[str, Mapping[str, Any]] = {
    "half": ours("0.5"),
    "full": ours("1"),
    f"full at {BEFORE}": ours("1", before=True),
    "half, overlapped": ours("0.5", *OVERLAP),
    "full, overlapped": ours("1", *OVERLAP),
    "stock megatron-core, full": {"trainer": "stock"},
    "DDP, the same frozen": theirs("ddp", frozen=True),
    "DDP, full": theirs("ddp", frozen=False),
    "FSDP2, the same frozen": theirs("fsdp2", frozen=True),
    "FSDP2, full": theirs("fsdp2", frozen=False),
    "DDP + ZeRO-1, the same frozen": theirs("zero1", frozen=True),
    "DDP + ZeRO-1, full": theirs("zero1", frozen=False),
    "DDP, the same frozen, default AdamW": theirs("ddp", frozen=True, fused=False),
    "DDP, full, default AdamW": theirs("ddp", frozen=False, fused=False),
}


@dataclass(frozen=True, kw_only=True)
class Set:
    """Trainers that are in memory together, 20 GB at most; the first one writes the batches."""

    trainers: Sequence[str]
    works: Sequence[str]
    """Default workloads to measure it on."""
    layout: str = USUAL_LAYOUT

    @property
    def data_size(self) -> int:
        """Data-parallel ranks."""
        return 2 if self.layout == USUAL_LAYOUT else 1


OF_A_MODEL_PARALLEL_LAYOUT = ("half", "full", "stock megatron-core, full")
SETS: Mapping[str, Set] = {
    "before and DDP": Set(trainers=("half", "full", f"full at {BEFORE}", "DDP, the same frozen"), works=tuple(WORKS)),
    "full": Set(trainers=("half", "full", "DDP, full", "stock megatron-core, full"), works=tuple(WORKS)),
    "FSDP2": Set(trainers=("half", "full", "FSDP2, the same frozen", "FSDP2, full"), works=tuple(WORKS)),
    "ZeRO-1": Set(trainers=("half", "full", "DDP + ZeRO-1, the same frozen", "DDP + ZeRO-1, full"), works=("128",)),
    "default AdamW": Set(
        trainers=("half", "full", "DDP, the same frozen, default AdamW", "DDP, full, default AdamW"), works=("128",)
    ),
    "overlap": Set(trainers=("half", "full", "half, overlapped", "full, overlapped"), works=("128", "512")),
    "TP 2": Set(trainers=OF_A_MODEL_PARALLEL_LAYOUT, works=("512",), layout="TP 2"),
    "TP 2 + SP": Set(trainers=OF_A_MODEL_PARALLEL_LAYOUT, works=("512",), layout="TP 2 + SP"),
    # With one micro-batch one stage waits for the other.
    "PP 2": Set(trainers=OF_A_MODEL_PARALLEL_LAYOUT, works=("4 x 512",), layout="PP 2"),
}


class Trainer:
    """The ranks of one trainer, which wait between steps."""

    def __init__(self, name: str, one: Set, folder: Path, work: Work, steps: int, device: str, code: Path) -> None:
        self.name = name
        facts = TRAINERS[name]
        self._log = (folder / "trainers.log").open("a", encoding="utf-8")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self._ranks, self._links = [], []
        for rank in range(2):
            mine, its = socket.socketpair()
            job = {**facts, "folder": str(folder), "steps": steps, "rank": rank, "device": device}
            job["layout"] = LAYOUTS[one.layout]
            if facts["trainer"] == "ours":
                job["writes batches"] = name == "half"
                job["words"] = _command(folder, one, work, steps, device, facts["words"])
            variables = {
                "PYTHONPATH": f"{code if facts.get('before') else REPOSITORY}:{HERE}",
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
                **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
                **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2"),
            }
            surroundings = cpu_environment(variables)
            if device == "cuda":
                del surroundings["CUDA_VISIBLE_DEVICES"]
            process = subprocess.Popen(
                [sys.executable, str(HERE / "peer_rank.py"), json.dumps(job), str(its.fileno())],
                env=surroundings,
                cwd=folder,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(its.fileno(),),
            )
            its.close()
            self._ranks.append(process)
            self._links.append(mine.makefile("rw", encoding="utf-8"))
            mine.close()

    def answers(self) -> list[dict[str, Any]]:
        """A line of every rank."""
        found = [link.readline() for link in self._links]
        if not all(found):
            said = Path(self._log.name).read_text(encoding="utf-8").splitlines()
            raise DemoError("\n".join([f"{self.name} ended; its folder is removed; the end of its log:", *said[-30:]]))
        return [json.loads(line) for line in found]

    def step(self) -> dict[str, Any]:
        """One step of both ranks: the slower one's time, and the bytes of both on the wire."""
        sent = _loopback_bytes()
        for link in self._links:
            link.write("step\n")
            link.flush()
        answers = self.answers()
        slowest = max(answers, key=lambda answer: float(answer["step (ms)"]))
        return {
            **slowest,
            # The last pipeline stage's, which alone knows it.
            "loss": next(answer["loss"] for answer in reversed(answers) if answer["loss"] is not None),
            "processor (ms)": sum(answer["processor (ms)"] for answer in answers) / 2,
            "page faults": sum(answer["page faults"] for answer in answers) / 2,
            "wire (MB per rank)": (_loopback_bytes() - sent) / 2e6,
            "peak resident (MB)": max(answer["peak resident (MB)"] for answer in answers),
        }

    def close(self) -> None:
        """Ends the ranks."""
        for process in self._ranks:
            process.kill()
            process.wait()
        for link in self._links:
            link.close()
        self._log.close()


def _loopback_bytes() -> int:
    """Bytes that this machine has sent to itself, by the kernel's counter; nothing else should be at work."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text(encoding="utf-8"))


def _command(folder: Path, one: Set, work: Work, steps: int, device: str, options: Sequence[str]) -> list[str]:
    layout = [
        word
        for name, value in LAYOUTS[one.layout].items()
        for word in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]
    return [
        *("sft", "--load-hf", str(folder / "model"), "--tokenizer-model", str(folder / "tokenizer.model")),
        *("--train-data-path", str(folder / "train.jsonl"), "--long-examples", "truncate"),
        *("--seq-length", str(work.sequence), "--micro-batch-size", "1"),
        *("--global-batch-size", str(one.data_size * work.micro_batches), "--train-iters", str(steps)),
        *("--lr", "1e-4", "--lr-decay-style", "constant", "--weight-decay", "0.01"),
        *("--adam-beta2", "0.999", "--adam-eps", "1e-8", "--clip-grad", "1.0"),
        "--bf16" if device == "cuda" else "--no-bf16",
        *layout,
        *options,
    ]


@contextmanager
def code_before(folder: Path) -> Iterator[Path]:
    """A worktree of the commit before."""
    tree = folder / "before"
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(tree), BEFORE], check=True)
    try:
        yield tree
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def write_model(folder: Path) -> None:
    """``folder/model``: random weights, as transformers draws them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(folder / "model")


def measure_set(one: Set, folder: Path, work: Work, rounds: int, device: str, code: Path) -> dict[str, Any]:
    """A step of every trainer in each round, and the trainers' first losses, which must agree."""
    names, steps = one.trainers, WARM_UP_ROUNDS + rounds
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with ExitStack() as stack:
        trainers = []
        for number, name in enumerate(names):
            trainer = Trainer(name, one, folder, work, steps, device, code)
            stack.callback(trainer.close)
            trainers.append(trainer)
            if number == 0:
                trainer.answers()  # the batches are there
        for trainer in trainers[1:]:
            trainer.answers()
        for round in range(steps):
            first = round % len(trainers)
            for trainer in (*trainers[first:], *trainers[:first]):
                taken[trainer.name].append(trainer.step())
    losses = {name: figures[0]["loss"] for name, figures in taken.items()}
    for name, loss in losses.items():
        if abs(loss / losses[names[0]] - 1) > AGREE:
            raise DemoError(f"the first loss of {name} is {loss}, and {losses[names[0]]} of {names[0]}: not one work")
    return {
        "layout": one.layout,
        "first losses": losses,
        "trainers": {name: _medians(figures[WARM_UP_ROUNDS:]) for name, figures in taken.items()},
        "ratios": {
            f"{ours} / {other}": spread(
                [a["step (ms)"] / b["step (ms)"] for a, b in zip(taken[ours], taken[other], strict=True)][
                    WARM_UP_ROUNDS:
                ]
            )
            for ours in names[:2]
            for other in names
            if ours != other
        },
    }


def _medians(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = [
        name for name in figures[0] if name.endswith(("(ms)", "faults", "(MB)", "rank)")) and name != "phases (ms)"
    ]
    found: dict[str, Any] = {name: round(median(one[name] for one in figures), 1) for name in names}
    phases = figures[0].get("phases (ms)") or {}
    if phases:
        found["phases (ms)"] = {name: round(median(one["phases (ms)"][name] for one in figures), 1) for name in phases}
    return found


def spread(ratios: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)], "rounds": len(ratios)}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the result file holds. Raises DemoError when a trainer fails."""
    chosen = [f" --work {shlex.quote(one)}" for one in options.work or ()]
    chosen += [f" --set {shlex.quote(one)}" for one in options.set or ()]
    words = f"--rounds {options.rounds} --device {options.device}{''.join(chosen)}"
    results: dict[str, Any] = {
        "command": f"python tools/bench/peers.py {words}",
        "environment": environment(),
        "works": {},
    }
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        folder = Path(name)
        write_data(folder)
        write_model(folder)
        with code_before(folder) as code:
            for work in options.work or WORKS:
                results["works"][work] = {}
                for one in options.set or [name for name, found in SETS.items() if work in found.works]:
                    print(f"{work} tokens: {one}", flush=True)
                    try:
                        results["works"][work][one] = measure_set(
                            SETS[one], folder, WORKS[work], options.rounds, options.device, code
                        )
                    except DemoError as error:
                        failures.append(f"{work} tokens, {one}: {error}")
    if failures:
        incomplete = options.output.with_suffix(".incomplete.json")
        incomplete.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        raise DemoError("\n".join([*failures, f"the other sets are in {incomplete}"]))
    return results


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description="Compare a step with what people use instead.")
    parser.add_argument(
        "--rounds", type=int, default=7, help="steps of each trainer after two that warm up (default: 7)"
    )
    parser.add_argument("--work", action="append", choices=list(WORKS), help="only this one (default: all)")
    parser.add_argument("--set", action="append", choices=list(SETS), help="only this one (default: all of the work)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="what ranks are on (default: cpu)")
    return measure_and_render(parser, RESULTS, measure, render, picture)


if __name__ == "__main__":
    sys.exit(main())
