"""Adapters: equal to PEFT's on every layout, free of what frozen weights would cost, kept, merged and taken up again.

Run: pytest tests/trainer/test_lora.py
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from hft_megatron.checkpoint.folders import find_checkpoints
from hft_megatron.config.lora import LoraConfig
from hft_megatron.trainer.convert import convert_checkpoint
from tests.support.models import LAYOUTS, build_from_folder, flags, forward_logits
from tests.support.plain_lora import peft_model, peft_run
from tests.support.preferences import words_for_pairs, write_pairs
from tests.support.probe import Probe
from tests.support.ranks import RankPools, RanksFailed
from tests.support.runs import make_inputs, run_recorded, run_sft_words, words_for

RANK = 4
SMALL = {"hidden_size": 36, "intermediate_size": 54, "head_dim": 10}
TRAINING = ["--train-iters", 10, "--adam-eps", 1e-5, "--lora-rank", RANK]
"""Adam's epsilon is large enough that a gradient that is rounding and nothing else moves no weight by a whole step."""
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "3000"]
RECOMPUTED = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
CASES: dict[str, list[Any]] = {
    "tp2": flags(LAYOUTS["tp2"]),
    "tp2_sp": [*flags(LAYOUTS["tp2_sp"]), "--packing"],
    "pp2_vpp": [*flags(LAYOUTS["pp2_vpp"]), *RECOMPUTED],
    "dp2": [*OVERLAP, "--lora-targets", "q_proj,v_proj,down_proj"],
}
TOKENS = torch.tensor([[1, 5, 9, 200, 44, 17, 3, 250]])


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("lora"), **SMALL)
    write_pairs(folder / "pairs.jsonl", 24)
    return folder


def run_probed(words: list[str]) -> dict[str, Any]:
    probe = Probe()
    with probe.watch():
        values = run_recorded("sft", words, probe)
    return {**values, **probe.report()}


def untrained(ranks: RankPools, words: list[str], folder: Path) -> Path:
    """The adapter that a run of these words begins with."""
    ranks(1).run(run_sft_words, words=[*words, "--train-iters", "0", "--save-lora", str(folder)])
    return folder


@pytest.mark.slow(reason="two runs, and PEFT's")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.engine) if case in ("tp2_sp", "pp2_vpp") else case for case in CASES]
)
def test_adapters_train_as_pefts_do_and_what_is_frozen_costs_nothing(
    ranks: RankPools, inputs: Path, tmp_path: Path, case: str
) -> None:
    chosen = [word for word in CASES[case] if word in ("--packing", "--lora-targets") or "proj" in str(word)]
    words = words_for(inputs, *TRAINING, *chosen)
    start = untrained(ranks, words, tmp_path / "start")
    losses, expected = peft_run(words, start)
    whole = words_for(inputs, *TRAINING, *CASES[case], "--save-lora", tmp_path / "end")
    answers = ranks(2).run(run_probed, words=whole)
    assert [step["loss"] for step in answers[-1]["steps"]] == pytest.approx(losses, rel=1e-5)
    found = load_file(tmp_path / "end" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert float((tensor - expected[name]).abs().max()) < 1e-5, name
    moved = {name: tensor for name, tensor in found.items() if "lora_B" in name and bool(tensor.any())}
    assert len(moved) == len(found) / 2
    for answer in answers:
        assert answer["table"] == answer["parameters"]
        for seen in answer["rounds"]:
            assert seen["changed while frozen"] == []
            assert seen["leftovers"] == {}
            assert seen["held"] == seen["held by formula"] == seen["reported as held"]
            assert all(step["sent"][0] == seen["wire by formula"][0] for step in seen["steps"])


@pytest.fixture(scope="session")
def trained(ranks: RankPools, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``lora`` and ``merged`` at the end of a run with checkpoints in ``run``."""
    folder = tmp_path_factory.mktemp("trained")
    words = words_for(inputs, *TRAINING, "--save", folder / "run", "--save-interval", 5)
    words += ["--save-lora", str(folder / "lora"), "--save-hf", str(folder / "merged")]
    ranks(2).run(run_sft_words, words=[*words, *flags(LAYOUTS["tp2"])])
    return folder


def run_logits(base: str, adapter: str, layout: dict[str, Any]) -> list[list[float]]:
    """Of a model with the adapter of a folder; none off the last stage."""
    chunks, shape, _ = build_from_folder(base, layout, lora=LoraConfig(lora_adapter=adapter))
    found = forward_logits(chunks, TOKENS, micro_batches=1)
    return [row.tolist() for row in found[0][0, :, : shape.vocab_size]] if found else []


def peft_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits[0]
    return logits


@pytest.mark.slow
def test_peft_and_the_merged_folder_give_our_logits_and_the_adapter_does_something(
    ranks: RankPools, inputs: Path, trained: Path
) -> None:
    with_adapter = peft_logits(peft_model(inputs / "model", trained / "lora"))
    base, merged = (
        peft_logits(LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32))
        for folder in (inputs / "model", trained / "merged")
    )
    assert float((with_adapter - base).abs().max()) > 0.1
    assert float((with_adapter - merged).abs().max()) < 1e-5
    answers = ranks(2).run(
        run_logits, base=str(inputs / "model"), adapter=str(trained / "lora"), layout=LAYOUTS["tp2_sp"]
    )
    assert float((torch.tensor(answers[0]) - with_adapter).abs().max()) < 1e-4


@pytest.mark.slow
def test_a_checkpoint_holds_adapters_alone_and_converts_to_the_merged_folder(
    inputs: Path, trained: Path, tmp_path: Path
) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    checkpoint = find_checkpoints(str(trained / "run")).newest
    assert checkpoint is not None
    held = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    weights = [name for name in held if name.endswith(".weight")]
    assert weights
    assert all(".adapter.lora_" in name for name in weights)
    convert_checkpoint(str(trained / "run"), None, str(tmp_path / "out"), save_dtype=None, check=False, announce=print)
    expected = load_file(trained / "merged" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-7, rtol=0, msg=name)


RESUMED: dict[str, list[Any]] = {
    "dp2": OVERLAP,
    "tp2_sp": flags(LAYOUTS["tp2_sp"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", RESUMED)
def test_a_stopped_run_with_dropout_resumes_to_the_same_bits(
    ranks: RankPools, inputs: Path, tmp_path: Path, layout: str
) -> None:
    words = words_for(inputs, *TRAINING, "--lora-dropout", 0.2, *RESUMED[layout], "--train-iters", 6)
    saved = [*words, "--save", str(tmp_path / "run"), "--load", str(tmp_path / "run")]
    whole = ranks(2).run(run_sft_words, words=words)
    parts = [ranks(2).run(run_sft_words, words=saved, kill_at=stop) for stop in (3, None)]
    for rank in range(2):
        assert [step for part in parts for step in part[rank]["steps"]] == whole[rank]["steps"]
        assert parts[-1][rank]["state"] == whole[rank]["state"]
    without = ranks(2).run(run_sft_words, words=[*words, "--lora-dropout", "0"])
    assert without[-1]["steps"][0]["loss"] == whole[-1]["steps"][0]["loss"], "B is zero at the start"
    assert without[-1]["steps"][-1]["loss"] != whole[-1]["steps"][-1]["loss"]


@pytest.mark.slow
def test_a_run_continues_from_pefts_folder_and_from_no_other_base(
    ranks: RankPools, inputs: Path, trained: Path, tmp_path: Path
) -> None:
    words = words_for(inputs, "--lora-adapter", trained / "lora", "--train-iters", 0, "--save-lora", tmp_path / "same")
    ranks(1).run(run_sft_words, words=words)
    expected = load_file(trained / "lora" / "adapter_model.safetensors")
    found = load_file(tmp_path / "same" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    peft_model(inputs / "model", trained / "lora").save_pretrained(str(tmp_path / "pefts"))
    words = words_for(inputs, "--lora-adapter", tmp_path / "pefts", "--train-iters", 0)
    words += ["--save-lora", str(tmp_path / "again")]
    ranks(1).run(run_sft_words, words=words)
    found = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    other = Path(shutil.copytree(inputs / "model", tmp_path / "model"))
    weights = load_file(other / "model.safetensors")
    save_file(weights | {"model.norm.weight": 2 * weights["model.norm.weight"]}, other / "model.safetensors")
    words = words_for(inputs, *TRAINING, "--load", trained / "run", "--load-hf", other, "--train-iters", 12)
    with pytest.raises(RanksFailed, match=r"model's weights \(--load-hf\)"):
        ranks(1).run(run_sft_words, words=words)


@pytest.mark.slow(reason="six runs")
def test_under_bf16_an_adapter_goes_from_folder_to_folder_in_fp32(
    ranks: RankPools, inputs: Path, trained: Path, tmp_path: Path
) -> None:
    expected = load_file(trained / "lora" / "adapter_model.safetensors")
    assert not all(torch.equal(tensor.bfloat16().float(), tensor) for tensor in expected.values())
    words = words_for(inputs, "--bf16", "--lora-adapter", trained / "lora")
    still = ["--train-iters", "3", "--lr", "0"]  # nothing decays either
    for name, more in (("read", ["--train-iters", "0", *flags(LAYOUTS["tp2"])]), ("trained", [*still, *OVERLAP])):
        ranks(2).run(run_sft_words, words=[*words, *more, "--save-lora", str(tmp_path / name)])
        found = load_file(tmp_path / name / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name
    saved = words_for(inputs, *TRAINING, "--bf16", *OVERLAP, "--save", tmp_path / "run", "--load", tmp_path / "run")
    saved += ["--save-lora", str(tmp_path / "new")]
    in_bf16 = ranks(2).run(run_sft_words, words=saved)
    in_fp32 = ranks(2).run(run_sft_words, words=[*saved[: saved.index("--save")], "--no-bf16"])
    losses = [[step["loss"] for step in values[-1]["steps"]] for values in (in_bf16, in_fp32)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0][-1] < 0.9 * losses[0][0]
    written = (tmp_path / "new" / "adapter_model.safetensors").stat().st_mtime_ns
    again = ranks(2).run(run_sft_words, words=saved)
    assert any("new already holds the adapter of iteration 10" in line for line in again[0]["said"])
    assert (tmp_path / "new" / "adapter_model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(RanksFailed, match="adapter of this run, of iteration 10; choose a new folder"):
        ranks(2).run(run_sft_words, words=[*saved, "--train-iters", "12"])


@pytest.mark.slow
def test_an_adapter_that_peft_would_leave_out_in_silence_is_refused(
    ranks: RankPools, inputs: Path, trained: Path, tmp_path: Path
) -> None:
    tensors = load_file(trained / "lora" / "adapter_model.safetensors")
    without_prefix = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    silent = {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}
    for held, why in ((without_prefix, "is missing|belongs to no matrix"), (silent, "does nothing")):
        save_file(held, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text((trained / "lora" / "adapter_config.json").read_text())
        with pytest.raises(RanksFailed, match=why):
            ranks(1).run(run_sft_words, words=words_for(inputs, "--lora-adapter", tmp_path))


@pytest.mark.slow
def test_the_reference_of_a_tuning_is_the_model_without_its_adapters(
    ranks: RankPools, inputs: Path, trained: Path, tmp_path: Path
) -> None:
    from tests.support.runs import run_method_words

    def tune(kind: str, *options: object) -> list[dict[str, Any]]:
        words = words_for_pairs(inputs, "--train-iters", 4, *options, kind=kind, cache=tmp_path)
        return ranks(2).run(run_method_words, method="dpo", words=words)

    shared, precomputed = (tune(kind, "--lora-rank", RANK, *OVERLAP) for kind in ("shared", "precompute"))
    first = shared[-1]["steps"][0]["measured"]
    assert [first[f"rewards/{half}"] for half in ("chosen", "rejected", "margins")] == [0.0, 0.0, 0.0]
    losses = [[step["loss"] for step in run[-1]["steps"]] for run in (shared, precomputed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 4
    # Of an adapter that has been trained the reference is the base, too.
    gone_on = [tune(kind, "--lora-adapter", trained / "lora") for kind in ("shared", "model")]
    assert gone_on[0][-1]["steps"] == gone_on[1][-1]["steps"]
    assert gone_on[0][-1]["steps"][0]["measured"]["kl"] != 0.0


@pytest.mark.slow
def test_a_sequence_continues_with_the_adapters_of_the_task_before(
    ranks: RankPools, inputs: Path, trained: Path, tmp_path: Path
) -> None:
    words = words_for(inputs, *TRAINING, "--finetune", "--load", trained / "run", "--save", tmp_path / "second")
    words += ["--lora-dropout", "0.01"]  # which the run before did not have
    words += ["--train-iters", "2", "--lr-warmup-iters", "0", "--hft-first-round", "1"]
    answers = ranks(1).run(run_sft_words, words=words)
    assert answers[0]["steps"][0]["loss"] < 0.9 * first_loss(trained / "run")
    checkpoint = find_checkpoints(str(tmp_path / "second")).newest
    assert checkpoint is not None
    assert json.loads((checkpoint / "plan.json").read_text())["rounds"] == [1]


def first_loss(run: Path) -> float:
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    return float(line["lm loss"])
