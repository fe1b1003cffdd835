"""A rank that runs out of memory says what it needs and what needs less, and not a traceback."""

import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from hft_megatron.cli import boundary
from hft_megatron.cli.boundary import StatusFolder, run_command
from hft_megatron.errors import EXIT_FAILURE, RankFailed
from hft_megatron.trainer import resume, step
from hft_megatron.trainer.out_of_memory import is_of_memory
from tests.support.runs import Recorder, make_inputs, run_recorded, words_for

ON_CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 is free."


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("memory"))


def run_until_memory_is_gone(words: list[str], where: str) -> str:
    """What is said of an allocation that fails at ``where``: in the third step, or while weights are loaded."""
    recorder, original = Recorder(kill_at=None, kill_rank=0), step.run_schedule

    def allocate(*args: Any, **kwargs: Any) -> Any:
        if where == "step" and recorder.run.state.iteration < 2:
            return original(*args, **kwargs)
        if where == "step":
            raise torch.OutOfMemoryError(ON_CUDA)
        return torch.empty(1 << 50)

    module, name = (step, "run_schedule") if where == "step" else (resume, "load_hf_weights")
    with patch.object(module, name, allocate), pytest.raises(RankFailed) as caught:
        run_recorded("sft", words, recorder)
    return str(caught.value)


def test_an_allocation_that_fails_in_a_step_is_told_with_the_estimate_and_what_needs_less(ranks, inputs):
    words = words_for(inputs, "--micro-batch-size", 4, "--bf16")
    [said] = ranks(1).run(run_until_memory_is_gone, words=words, where="step")
    assert re.match(
        r"rank 0 on \S+ \(TP 0, PP 0, DP 0\) ran out of memory in iteration 3 \(allocating 2.00 GiB failed\); by "
        r"formula \(`plan --memory`\) it needs [\d.]+ MB of [\d.]+ GB: weights 357.\d kB, gradients [\d.]+ kB, "
        r"optimizer [\d.]+ MB, activations and logits of 4 x 96 tokens [\d.]+ MB; use --micro-batch-size [12], or "
        r".*, or a smaller --seq-length, or check what else uses memory there \(see `hft-megatron doctor`\)\.$",
        said,
    ), said


def test_an_allocation_that_fails_before_training_is_told_too(ranks, inputs):
    [said] = ranks(1).run(run_until_memory_is_gone, words=words_for(inputs), where="start")
    assert " ran out of memory while loading or exporting (allocating 4503599627370496 bytes failed" in said


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError(ON_CUDA), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("ncclUnhandledCudaError: Cuda failure 'out of memory'"), True),
        (RuntimeError("shape mismatch"), False),
        (KeyError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error: Exception, is_one: bool) -> None:
    assert is_of_memory(error) == is_one


def test_one_ranks_failure_is_its_own_sentence_and_stays_in_the_status_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boundary, "SAME_STEP_S", 0.0)

    def fail(status: StatusFolder) -> None:
        status.use(tmp_path)
        rank_0.use(tmp_path)
        raise RankFailed("rank 1 on node-a ran out of memory")

    rank_0 = StatusFolder()
    monkeypatch.setenv("RANK", "1")
    with patch.object(boundary.signal, "signal"):
        assert run_command(fail) == EXIT_FAILURE
    sentence = "error: rank 1 on node-a ran out of memory"
    assert capfd.readouterr().err == f"hft-megatron: {sentence}\n"
    rank_0.write(EXIT_FAILURE, "failed", "rank 1 ended with exit code 1", is_consequence=True)
    assert json.loads((tmp_path / "status.json").read_text())["message"] == sentence
