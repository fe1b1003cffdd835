"""``hft-megatron plan`` of adapters, beside half and full fine-tuning. Run: pytest tests/cli/test_plan_lora.py"""

import json
from pathlib import Path

import pytest

from hft_megatron import errors
from hft_megatron.cli import main

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 128,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def test_adapters_stand_beside_half_and_full(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--tensor-model-parallel-size", "2", "--world-size", "4"]
    words = ["plan", "--load-hf", model, "--lora-rank", "8", *layout]
    assert main([*words, "--json"]) == errors.EXIT_OK
    report = json.loads(capsys.readouterr().out)
    attention, feed_forward = 4 * (64 + 64), 3 * (64 + 112)
    assert report["rounds"][0]["trainable_parameters"] == 4 * 8 * (attention + feed_forward)
    # Of q, k, v, gate and up B is cut and A is not; of o and down A is cut and B is not.
    whole, cut = 5 * 64 + 2 * 64, 3 * 64 + 2 * 112 + 64 + 112
    lora, half, full = (
        report[name]["ranks"][0] if name != "rounds" else report[name][0]["ranks"][0]
        for name in ("rounds", "half_fine_tuning", "full_fine_tuning")
    )
    assert lora["trainable_parameters"] == 4 * 8 * (whole + cut // 2)
    for name in ("trainable_parameters", "gradient_bytes", "optimizer_bytes", "reduce_scatter_bytes"):
        assert lora[name] < half[name] < full[name]
    assert main([*words, "--memory", "80GB"]) == errors.EXIT_OK
    text = capsys.readouterr().out
    assert "all adapters" in text
    assert "half fine-tuning (by default draws) on the same layout" in text


def test_full_fine_tuning_is_that_of_a_plan_without_adapters(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for options in ([], ["--lora-rank", "8"]):
        assert main(["plan", "--load-hf", model, "--memory", "80GB", "--json", *options]) == errors.EXIT_OK
        report = json.loads(capsys.readouterr().out)
        found.append((report["full_fine_tuning"], report["memory"]["full"]))
    assert found[0] == found[1]


def test_sizes_are_enough_and_a_plan_file_that_no_run_would_read_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--num-layers", "4", "--hidden-size", "64", "--ffn-hidden-size", "112", "--num-attention-heads", "4"]
    words = ["plan", *sizes, "--max-position-embeddings", "128", "--vocab-size", "96", "--lora-rank", "8"]
    assert main([*words, "--json"]) == errors.EXIT_OK
    parameters = json.loads(capsys.readouterr().out)["rounds"][0]["trainable_parameters"]
    assert parameters == 4 * 8 * (4 * (64 + 64) + 3 * (64 + 112))
    assert main([*words, "--save", str(tmp_path / "plan.json")]) == errors.EXIT_USAGE
    assert "is for plans that --hft-plan reads, but a run with --lora-rank reads none" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()
