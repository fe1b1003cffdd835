"""Runs the product by its command line, in this process or in one started for it, and reads its results."""

import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from working_site import REPOSITORY, Site, expect

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that a process sets itself for a run without a launcher; the next run gets a port of its own."""
SET_BY_TORCHRUN = (*PLACE, "GROUP_", "ROLE_", "TORCHELASTIC_")
LOSS, GRAD_NORM = "lm loss", "grad norm"
STEP_MS = "elapsed time per iteration (ms)"
SAME_BITS = ("iteration", "consumed samples", LOSS, GRAD_NORM, "learning rate")
"""Fields of metrics.jsonl that are equal in two equal runs."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Results of a finished run."""

    metrics: list[dict[str, Any]]
    """A record per step, as in metrics.jsonl; of a resumed run, for all its steps."""
    said: str
    """Output of rank 0."""
    peak_bytes: int
    """Peak of the device's memory; 0 on CPU."""

    def values(self, name: str) -> list[float]:
        return [line[name] for line in self.metrics if name in line]

    @property
    def bits(self) -> list[tuple[Any, ...]]:
        """Equal for runs that were the same bit for bit."""
        return [tuple(line[key] for key in SAME_BITS) for line in self.metrics]


def run(site: Site, method: str, *words: object, save: Path | None = None, exit_code: int = 0) -> Run:
    """``hft-megatron METHOD WORDS`` on this rank; every rank calls it. With ``save`` it saves, at its end too.

    Raises CheckFailed for an unexpected exit code.
    """
    import torch

    arguments = [method, *map(str, words), *(() if save is None else ("--save", str(save)))]
    on_card = torch.cuda.is_available()
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    with _logged() as records, _heard() as heard:
        code = _main(arguments)
    peak, said = torch.cuda.max_memory_allocated() if on_card else 0, heard.getvalue()
    clean_up()
    expect(
        code == exit_code,
        f"`hft-megatron {' '.join(arguments)}` ended with {code} instead of {exit_code}: {said[-600:]}",
    )
    metrics = _of_last_rank(site, records) if save is None else _written(site, save)
    return Run(metrics=metrics, said=said, peak_bytes=peak)


def _main(arguments: Sequence[str]) -> int:
    from hft_megatron.cli import main

    return main(arguments)


def _of_last_rank(site: Site, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of the last pipeline stage, which has the losses."""
    if site.ranks == 1:
        return records
    file = site.new_folder("records")
    if site.rank == site.ranks - 1:
        file.write_text(json.dumps(records), encoding="utf-8")
    site.meet()
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _written(site: Site, save: Path) -> list[dict[str, Any]]:
    site.meet()
    return read_metrics(save)


@contextlib.contextmanager
def _logged() -> Iterator[list[dict[str, Any]]]:
    """Records that runs log within the context, as in metrics.jsonl, which needs a checkpoint, and 7B's is large."""
    from hft_megatron.trainer.run import Run as ProductRun

    records: list[dict[str, Any]] = []
    log = ProductRun.log

    def also_here(of_run: ProductRun, metrics: Mapping[str, Any], *tracker: Any) -> None:
        records.append({"iteration": of_run.state.iteration, **metrics})
        log(of_run, metrics, *tracker)

    with patch.object(ProductRun, "log", also_here):
        yield records


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, without an incomplete one at the end; none before the first."""
    file = folder / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@contextlib.contextmanager
def _heard() -> Iterator[io.StringIO]:
    """Captures standard output and errors, which also go to their usual places."""
    said = io.StringIO()

    class Both(io.TextIOBase):
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def write(self, text: str) -> int:
            said.write(text)
            return int(self._stream.write(text))

        def flush(self) -> None:
            self._stream.flush()

        def fileno(self) -> int:
            return int(self._stream.fileno())

    with contextlib.redirect_stdout(Both(sys.stdout)), contextlib.redirect_stderr(Both(sys.stderr)):
        yield said


def clean_up() -> None:
    """Cleans up what a run leaves to the end of its process."""
    import torch
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from hft_megatron.parallel.groups import stop_groups

    stop_groups()
    # Its cache holds the model.
    RotaryEmbedding.forward.cache_clear()
    torch.use_deterministic_algorithms(False)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        for name in PLACE:
            os.environ.pop(name, None)
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def started(words: Sequence[object], log: Path, *, ranks: int = 1) -> "Iterator[subprocess.Popen[bytes]]":
    """``python -m hft_megatron WORDS`` as a process, under torchrun on several ranks; leaves nothing behind."""
    import psutil

    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "hft_megatron", *map(str, words)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=_own_environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid)
            for member in [*family.children(recursive=True), family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        process.wait()


def _own_environment() -> Mapping[str, str]:
    """This process's environment without torchrun's variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith(SET_BY_TORCHRUN)}


def wait_for_steps(process: "subprocess.Popen[bytes]", folder: Path, steps: int, log: Path) -> None:
    """Returns when a started run has taken this many steps. Raises CheckFailed where it ends before."""
    while len(read_metrics(folder)) < steps:
        said = log.read_text(encoding="utf-8", errors="replace")
        expect(process.poll() is None, f"the started run ended with exit code {process.poll()}: {said[-600:]}")
        time.sleep(0.02)
