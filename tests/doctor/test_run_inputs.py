"""Model, tokenizer, data and options, looked at as a run looks. Run: pytest tests/doctor/test_run_inputs.py"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.cli.doctor import DoctorOptions
from hft_megatron.config.loading import load_options
from hft_megatron.doctor import run_inputs
from hft_megatron.doctor.findings import Finding
from hft_megatron.doctor.run_inputs import RunInputs, wandb_finding
from tests.support.runs import make_inputs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def inputs(made: Path, tmp_path: Path) -> Path:
    """A copy of model and data, to damage."""
    shutil.copytree(made, tmp_path / "inputs")
    return tmp_path / "inputs"


def look_at(*words: object, method: Any = "sft", world_size: int = 1, has_data: bool = True) -> dict[str, Finding]:
    config = load_options(DoctorOptions, [str(word) for word in words]).as_run
    looks = RunInputs(method=method, config=config, world_size=world_size, has_data=has_data, said=set()).looks()
    return {finding.what: finding for _, look in looks for finding in look()}


def words_for(inputs: Path, *more: object) -> list[object]:
    model, data = inputs / "model", inputs / "data.jsonl"
    return ["--load-hf", model, "--train-data-path", data, "--seq-length", 96, "--no-bf16", *more]


def test_parts_that_agree_are_ok_and_described(inputs: Path) -> None:
    found = look_at(*words_for(inputs))
    assert [(what, finding.status) for what, finding in found.items()] == [
        ("model", "ok"),
        ("tokenizer", "ok"),
        ("weights", "ok"),
        ("run", "ok"),
        ("memory of a rank", "ok"),
    ]
    assert "24 examples" in found["run"].value


def test_a_tokenizer_too_large_for_the_model_is_wrong_and_the_weights_are_looked_at_still(inputs: Path) -> None:
    config = inputs / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 300}))
    found = look_at(*words_for(inputs))
    assert "has ids up to 333, but the model's vocabulary has 300 rows" in str(found["tokenizer"].fix)
    assert "embed_tokens" in str(found["weights"].fix)
    assert "run" not in found


def test_broken_data_are_named_by_line_while_the_parts_are_ok(inputs: Path) -> None:
    with (inputs / "data.jsonl").open("a") as file:
        file.write("{not json}\n")
    found = look_at(*words_for(inputs))
    assert (found["tokenizer"].status, found["weights"].status, found["run"].status) == ("ok", "ok", "wrong")
    assert "data.jsonl:25: the line is not valid JSON" in str(found["run"].fix)


def test_a_length_in_samples_is_no_mistake_where_no_data_is_given(inputs: Path) -> None:
    ramp = ["--train-samples", 40, "--global-batch-size", 8, "--rampup-batch-size", 2, 2, 12, "--lr-warmup-samples", 6]
    found = look_at("--load-hf", inputs / "model", "--seq-length", 96, "--no-bf16", *ramp, has_data=False)
    assert found["run"].status == "ok", found["run"].fix


def test_options_that_do_not_fit_the_model_are_wrong_with_the_sentence_of_a_run(inputs: Path) -> None:
    found = look_at(*words_for(inputs, "--seq-length", 100000))
    assert str(found["run"].fix).startswith("--seq-length 100000 is beyond the model's ")
    assert "memory of a rank" not in found


def test_missing_weights_are_said_once(inputs: Path) -> None:
    for file in (inputs / "model").glob("*.safetensors*"):
        file.unlink()
    found = look_at(*words_for(inputs))
    assert found["weights"].status == "wrong"
    assert "run" not in found


def test_a_model_folder_that_is_not_there_is_one_finding(tmp_path: Path) -> None:
    found = look_at("--load-hf", tmp_path / "none", has_data=False)
    assert [(what, finding.status) for what, finding in found.items()] == [("model", "wrong")]


def test_without_data_model_tokenizer_and_weights_are_looked_at(inputs: Path) -> None:
    found = look_at("--load-hf", inputs / "model", "--train-iters", 50, has_data=False)
    assert [finding.status for finding in found.values()] == ["ok"] * 5
    assert found["run"].value == "no data is given"


@pytest.mark.parametrize("vocabulary", [[], ["--vocab-size", 300]])
def test_a_model_of_sizes_without_a_tokenizer_gets_the_sentence_of_a_run(vocabulary: list[object]) -> None:
    sizes = ["--num-layers", 2, "--hidden-size", 64, "--num-attention-heads", 4, "--max-position-embeddings", 64]
    found = look_at(*sizes, *vocabulary, has_data=False)
    sized = [("memory of a rank", "ok")] if vocabulary else []  # without a vocabulary nobody knows
    assert [(what, finding.status) for what, finding in found.items()] == [("model", "ok"), ("run", "wrong"), *sized]
    assert str(found["run"].fix).startswith("--tokenizer-model is missing")


def test_space_is_compared_also_where_the_data_are_wrong(inputs: Path, tmp_path: Path) -> None:
    words = words_for(inputs, "--save", tmp_path / "run", "--train-iters", 20, "--save-interval", 5)
    good = look_at(*words)
    assert good["space to save"].status == "ok"
    assert ", 4 at a time " in good["space to save"].value
    (inputs / "data.jsonl").write_text("{not json}\n")
    bad = look_at(*words)
    assert bad["run"].status == "wrong"
    assert "a checkpoint takes about " in bad["space to save"].value


def test_a_corpus_is_read_as_pretrain_reads_it(inputs: Path) -> None:
    words = ["--load-hf", inputs / "model", "--seq-length", 32, "--train-iters", 4]
    assert look_at(*words, "--mock-data", method="pretrain")["run"].status == "ok"
    missing = look_at(*words, "--data-path", inputs / "none", method="pretrain")["run"]
    assert missing.status == "wrong"
    assert str(inputs / "none") in str(missing.fix)


def test_pairs_are_asked_for_by_dpo(inputs: Path) -> None:
    found = look_at(*words_for(inputs), method="dpo")
    assert (found["weights"].status, found["run"].status) == ("ok", "wrong")


def test_a_conversion_is_not_judged_by_the_memory_of_training(inputs: Path) -> None:
    found = look_at("--load-hf", inputs / "model", "--train-iters", 0, "--save-hf", inputs / "out", has_data=False)
    assert "memory of a rank" not in found


def test_a_model_too_large_for_its_device_is_wrong_and_one_with_too_long_sequences_a_warning(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_for(inputs, "--micro-batch-size", 4)
    fits = look_at(*words)["memory of a rank"]
    assert " x 96 tokens " in fits.value
    # 178,624 weights, half of them trained with 16 bytes in fp32.
    for room, status, fix in (
        (3_400_000, "warning", "for sequences as long as --seq-length: add --micro-batch-size 2"),
        (2_000_000, "wrong", "It does not fit: use TP "),
        (100_000, "wrong", "It does not fit: use a smaller --seq-length, or see `hft-megatron plan --memory`"),
    ):
        monkeypatch.setattr(run_inputs, "device_memory", lambda local_ranks, room=room: room)
        found = look_at(*words)["memory of a rank"]
        assert (found.status, fix in str(found.fix)) == (status, True), found


def test_a_pair_is_two_sequences_to_the_memory(inputs: Path) -> None:
    assert " of 2 x 96 tokens " in look_at(*words_for(inputs), method="dpo")["memory of a rank"].value


def test_wandb_needs_a_login_and_its_key_is_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_finding({}).status == "warning"
    assert wandb_finding({"WANDB_MODE": "offline"}).status == "ok"
    keyed = wandb_finding({"WANDB_API_KEY": "s3cret"})
    assert keyed.status == "ok"
    assert "s3cret" not in repr(keyed)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password s3cret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_finding({}).value == "logged in by ~/.netrc"
