"""The examples of examples/library, as a reader starts them. Run: pytest tests/library/test_examples.py"""

import contextlib
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from hft_megatron import Hook, Trainer, draw_plan
from hft_megatron.errors import Stopped, UserError
from hft_megatron.library import trainer
from hft_megatron.trainer.saving import Signals
from tests.support import forked
from tests.support.runs import make_inputs, run_cli

EXAMPLES = Path("examples/library")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    forked.await_server()
    folder = make_inputs(tmp_path_factory.mktemp("library"))
    rows = [{"prompt": f"Say {number}: ", "completion": f"{3 * number} bridge"} for number in range(16)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(words: list[object], folder: Path) -> str:
    done = forked.run([str(word) for word in words], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def test_the_trainer_trains_what_the_command_does_and_calls_the_users_hook(inputs: Path, tmp_path: Path) -> None:
    data = inputs / "answers.jsonl"
    said = run([EXAMPLES / "trainer_with_hook.py", inputs / "model", data, tmp_path / "by_library"], tmp_path)
    losses = [float(value) for value in re.findall(r"^round \d: mean loss (\d\.\d{4})$", said, re.MULTILINE)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    words = ["--load-hf", inputs / "model", "--train-data-path", data, "--train-iters", 6, "--global-batch-size", 4]
    words += ["--seq-length", 128, "--lr", 1e-3, "--hft-round-interval", 3, "--hft-rotation", "complementary"]
    log = tmp_path / "log"
    assert run_cli([*map(str, words), "--save-hf", str(tmp_path / "by_command")], log=log) == 0, log.read_text()
    one, other = weights(tmp_path / "by_library"), weights(tmp_path / "by_command")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_megatron_core_loop_learns_the_same_on_one_rank_and_on_two(inputs: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        words = [*forked.torchrun(ranks), EXAMPLES / "megatron_core_loop.py", inputs / "model", ranks]
        said = run(words, tmp_path)
        found.append([float(value) for value in re.findall(r"step \d: loss (\d\.\d{4})", said)])
    assert found[0] == pytest.approx(found[1], abs=2e-4)
    assert len(found[0]) == 4
    assert found[0][3] < found[0][0] - 0.5


def test_trls_own_trainer_trains_another_half_in_each_epoch(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = tmp_path / "tuned"
    said = run([EXAMPLES / "trl_round_per_epoch.py", inputs / "model", inputs / "answers.jsonl", output], tmp_path)
    plans = [draw_plan(LlamaConfig.from_pretrained(inputs / "model"), seed=1, round=round) for round in (0, 1)]
    assert re.findall(r"plan (\w{12}): round \d", said) == [plan.short_digest for plan in plans]
    before, after = weights(inputs / "model"), weights(output)
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    assert changed == plans[0].training | plans[1].training


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"load_fh": "x"}, "load_fh is not an option; the nearest is load_hf."),
        ({"lr": "fast"}, "lr fast: the value must be a number of at least 0."),
        ({"hft_ratio": 3}, "hft_ratio 3.0: must be a number between 0 and 1"),
        ({"micro_batch_size": 0}, "micro_batch_size 0"),
    ],
)
def test_a_mistake_in_the_trainers_options_is_told_in_terms_of_arguments(
    options: dict[str, Any], sentence: str, inputs: Path
) -> None:
    base = {"load_hf": inputs / "model", "train_data_path": [inputs / "answers.jsonl"], "train_iters": 2}
    with pytest.raises(ValueError, match=r".") as error:
        Trainer("sft", **(base | options))
    assert sentence in str(error.value)
    assert "--" not in str(error.value)


def test_a_path_in_a_sentence_is_left_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "models--meta-llama--Llama-2-7b-hf"
    with pytest.raises(ValueError, match=re.escape(f"load_hf {folder}: there is no such folder")):
        Trainer("sft", load_hf=folder)


@pytest.mark.parametrize(
    ("outcome", "raised"), [(None, None), (Stopped("Saved."), Stopped), (UserError("No room."), ValueError)]
)
def test_after_training_a_programs_own_signals_and_environment_are_as_they_were(
    outcome: Exception | None, raised: type[Exception] | None, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: object, signals: Signals, **__: object) -> None:
        assert os.environ["RANK"] == "0"
        assert os.environ["MASTER_ADDR"] == "127.0.0.1"
        signals.listen()
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        if outcome is not None:
            raise outcome
        signals.close()

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "mine")
    monkeypatch.setattr(trainer, "run_training", train)
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    handlers, environment = [signal.getsignal(number) for number in Signals.NUMBERS], dict(os.environ)
    try:
        run = Trainer("sft", load_hf=inputs / "model", train_data_path=[inputs / "answers.jsonl"], train_iters=3)
        with contextlib.nullcontext() if raised is None else pytest.raises(raised):
            run.train()
        assert [signal.getsignal(number) for number in Signals.NUMBERS] == handlers
        assert dict(os.environ) == environment
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_method_that_there_is_not_is_refused_and_hooks_are_public() -> None:
    with pytest.raises(ValueError, match="method='ppo' must be one of 'sft', "):
        Trainer("ppo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"hooks has a object, which doesn't extend hft_megatron.Hook"):
        Trainer("sft", hooks=[object()])  # type: ignore[list-item]
    assert {"at_round_start", "after_step", "at_round_end", "at_end"} <= set(dir(Hook))
