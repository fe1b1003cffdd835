"""Profiled iterations: a trace that Perfetto reads. Run: pytest tests/trainer/test_profiling.py"""

import contextlib
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hft_megatron.trainer import profiling
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("profiled"))


def ranges_of(trace: Path) -> dict[str, list[tuple[float, float]]]:
    """name -> beginning and end in microseconds of every range that is no operator; checks what a Chrome trace must
    have."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert all({"name", "ts", "dur", "pid", "tid"} <= event.keys() for event in complete)
    assert any(event["name"] == "aten::mm" for event in complete)
    found: dict[str, list[tuple[float, float]]] = {}
    for event in complete:
        if event.get("cat") == "user_annotation":
            found.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    return found


@pytest.mark.engine
def test_a_trace_of_each_rank_has_the_iterations_and_the_sections_of_their_steps(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    options = ["--micro-batch-size", 1, "--overlap-grad-reduce", "--hft-round-interval", 3]
    words = words_for(inputs, *options)
    asked = ["--profile", "--use-pytorch-profiler", "--profile-step-start", "2", "--profile-step-end", "4"]
    asked += ["--profile-ranks", "0", "1", "--save", str(tmp_path / "run")]
    alone = ranks(2).run(run_sft_words, words=words)
    profiled = ranks(2).run(run_sft_words, words=[*words, *asked])
    assert [one["state"] for one in profiled] == [one["state"] for one in alone]
    folder = tmp_path / "run" / "torch_profile"
    lines = [line for line in profiled[0]["said"] if line.startswith("> profil")]
    assert lines == [
        f"> profiling iterations 3 to 4 of ranks 0 to 1 for traces in {folder}",
        f"> profiles written to {folder}/iterations-3-4.rank-*.json.gz (open them with Perfetto)",
    ]
    traces = sorted(folder.iterdir())
    assert [trace.name for trace in traces] == [f"iterations-3-4.rank-{rank}.json.gz" for rank in range(2)]
    for trace in traces:
        ranges = ranges_of(trace)
        assert {"iteration 2", "iteration 5"}.isdisjoint(ranges)
        iterations = [ranges["iteration 3"][0], ranges["iteration 4"][0]]
        assert iterations[0][1] <= iterations[1][0]
        for section, times in (("forward", 2), ("backward", 2), ("optimizer", 1), ("reduce-scatter wait", 1)):
            for begin, end in iterations:
                inside = [one for one in ranges[section] if begin <= one[0] and one[1] <= end]
                assert len(inside) >= times, section


@pytest.mark.parametrize(
    ("start", "stop", "names"),
    [
        pytest.param(4, 9, ["iterations-5-6.rank-0.json.gz"], marks=pytest.mark.slow),
        pytest.param(0, 1, ["iterations-1-1.rank-0.json.gz"], marks=pytest.mark.slow),
        (2, 4, ["iterations-3-4.rank-0.json.gz"]),
        pytest.param(6, 7, [], marks=pytest.mark.slow),
    ],
)
def test_without_cuda_torch_profiles_anyway_and_as_much_as_there_is(
    start: int, stop: int, names: list[str], ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    steps = ["--profile-step-start", start, "--profile-step-end", stop]
    words = words_for(inputs, "--profile", *steps, "--tensorboard-dir", tmp_path / "tb")
    # Iterations that are skipped are iterations.
    skipping = ["--iterations-to-skip", "2", "4", "9"] if start == 2 else []
    [report] = ranks(1).run(run_sft_words, words=[*words, *skipping])
    idle = "> warning: --iterations-to-skip 9 has no effect: this run trains iterations 1 to 6"
    assert [line for line in report["said"] if line.startswith("> warning")] == [idle] * bool(skipping)
    folder = tmp_path / "tb" / "torch_profile"
    assert [trace.name for trace in folder.glob("*")] == names
    assert any(line.startswith("> profiles written to ") for line in report["said"]) == bool(names)


@pytest.mark.slow
def test_a_resumed_run_profiles_what_is_left_of_its_iterations(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    words = words_for(inputs, "--save", tmp_path, "--load", tmp_path)
    ranks(1).run(run_sft_words, words=[*words, "--train-iters", "3", "--lr-decay-iters", "6"])
    words += ["--lr-decay-iters", "6", "--profile", "--profile-step-start", "1", "--profile-step-end", "5"]
    ranks(1).run(run_sft_words, words=words)
    [trace] = (tmp_path / "torch_profile").iterdir()
    assert {name for name in ranges_of(trace) if name.startswith("iteration ")} == {"iteration 4", "iteration 5"}


@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_the_trace_of_what_it_did(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    stops = ["--profile-step-start", "1", "--profile-step-end", "5", "--exit-interval", "3"]
    [report] = ranks(1).run(run_sft_words, words=words_for(inputs, "--save", tmp_path, "--profile", *stops))
    assert report["stopped"].startswith("--exit-interval 3 stopped the run at iteration 3")
    [trace] = (tmp_path / "torch_profile").iterdir()
    assert trace.name == "iterations-2-3.rank-0.json.gz"
    assert ranges_of(trace).keys() >= {"iteration 2", "iteration 3"}


def test_without_cuda_and_a_folder_there_is_no_place_for_a_trace(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match="--profile without CUDA uses torch's profiler"):
        ranks(1).run(run_sft_words, words=words_for(inputs, "--profile"))


def test_nsys_captures_between_the_start_and_the_stop_of_cudas_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    @contextlib.contextmanager
    def ranges(**options: Any) -> Iterator[None]:
        calls.append("ranges")
        yield
        calls.append("no ranges")

    runtime = SimpleNamespace(
        cudaProfilerStart=lambda: calls.append("start") or 0, cudaProfilerStop=lambda: calls.append("stop") or 0
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    monkeypatch.setattr(profiling, "emit_nvtx", ranges)
    with profiling._captured_by_nsys():
        calls.append("iteration")
    assert calls == ["start", "ranges", "iteration", "no ranges", "stop"]
