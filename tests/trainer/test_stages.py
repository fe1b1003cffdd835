"""Fine-tuning and preference tuning as one run: their halves are disjoint, and it resumes wherever it was stopped.

Run: pytest tests/trainer/test_stages.py
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hft_megatron.checkpoint.folders import complete_checkpoints
from tests.support import forked
from tests.support.preferences import make_pairs
from tests.support.runs import read_metrics, run_cli, write_data

STAGES = """
- method: sft
  train_data_path: {sft}
  train_iters: 4
  lr: 5e-3
- method: dpo
  train_data_path: [{dpo}]
  train_iters: 3
  global_batch_size: 2
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_pairs(tmp_path_factory.mktemp("stages"), hidden_size=32, intermediate_size=56)
    write_data(folder / "data.jsonl", 24)
    text = STAGES.format(sft=folder / "data.jsonl", dpo=folder / "pairs.jsonl")
    (folder / "stages.yaml").write_text(text)
    return folder


def words_of(inputs: Path, save: Path, *options: object) -> list[str]:
    base = ["--stages", inputs / "stages.yaml", "--load-hf", inputs / "model", "--seq-length", 96, "--no-bf16"]
    base += ["--global-batch-size", 4, "--lr", 1e-3, "--lr-decay-style", "constant", "--save", save, "--load", save]
    base += ["--hft-rotation", "complementary", "--dpo-reference", "shared"]
    return [str(word) for word in (*base, *options)]


def run(words: list[str], log: Path, *, ranks: int | None = None) -> None:
    assert run_cli(words, ranks=ranks, log=log, method="dpo") == 0, log.read_text()[-3000:]


def changed(before: Path, after: Path) -> set[str]:
    """Units whose values differ between two Hugging Face folders."""
    one, other = (load_file(folder / "model.safetensors") for folder in (before, after))
    return {name.removesuffix(".weight") for name, tensor in one.items() if not torch.equal(tensor, other[name])}


@pytest.mark.slow
def test_complementary_halves_of_the_layers_train_in_the_two_stages(inputs: Path, tmp_path: Path) -> None:
    save, middle, tuned, log = (tmp_path / name for name in ("run", "middle", "tuned", "log"))
    run(words_of(inputs, save, "--save-hf", tuned, "--tensor-model-parallel-size", 2), log, ranks=2)
    folders = [save / "stage_0_sft", save / "stage_1_dpo"]
    bills = [line for line in log.read_text().splitlines() if line.startswith("> the bill")]
    assert [line[:19] for line in bills] == ["> the bill: 4 steps", "> the bill: 3 steps", "> the bill of 2 of 2"[:19]]
    assert bills[0].endswith(f"details are in {folders[0]}/bill.json")
    assert bills[2].startswith("> the bill of 2 of 2 stages, measured on TP 2 x PP 1 x DP 1;")
    plans = [json.loads((complete_checkpoints(str(folder))[0] / "plan.json").read_text()) for folder in folders]
    assert [plan["rounds"] for plan in plans] == [[0], [1]]
    steps = [record for record in read_metrics(folders[1]) if "grad norm" in record]
    assert [step["round"] for step in steps] == [1, 1, 1]
    assert steps[0]["rewards/margins"] == 0.0
    tool = ["-m", "hft_megatron", "convert", "--load", str(folders[0]), "--save-hf", str(middle)]
    done = forked.run(tool, tmp_path)
    assert done.returncode == 0, done.stderr
    by_sft, by_dpo = changed(inputs / "model", middle), changed(middle, tuned)
    layers = {name for name in by_sft | by_dpo if ".layers." in name}
    assert not layers & by_sft & by_dpo
    assert len(layers) == 4 * 9
    assert by_sft & by_dpo == {"model.embed_tokens", "model.norm", "lm_head"}


@pytest.fixture(scope="module")
def whole(inputs: Path) -> Path:
    """What a run that nobody stopped exported."""
    run(words_of(inputs, inputs / "run", "--save-hf", inputs / "whole"), inputs / "log")
    return inputs / "whole"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stops", "folder"),
    [((2, 0), "save"), ((4, 0), "save"), ((4, 1), "moved/to")],
    ids=["in the first", "between", "in the second, whose folder was moved"],
)
def test_a_run_of_stages_resumes_to_the_last_bit(
    inputs: Path, whole: Path, tmp_path: Path, stops: tuple[int, int], folder: str
) -> None:
    parted, log = tmp_path / "parted", tmp_path / "log"
    short = (inputs / "stages.yaml").read_text()
    for now, later in zip((4, 3), stops, strict=True):
        short = short.replace(f"train_iters: {now}", f"train_iters: {later}")
    if stops[1] == 0:
        short = short[: short.index("- method: dpo")]
    (tmp_path / "short.yaml").write_text(short)
    run(words_of(inputs, tmp_path / "save", "--stages", tmp_path / "short.yaml"), log)
    save = tmp_path / folder
    save.parent.mkdir(exist_ok=True)
    (tmp_path / "save").rename(save)
    run(words_of(inputs, save, "--save-hf", parted), log)
    assert changed(inputs / "model", whole)
    assert not changed(whole, parted)
    (tmp_path / "longer.yaml").write_text((inputs / "stages.yaml").read_text().replace("iters: 4", "iters: 5"))
    longer = words_of(inputs, save, "--stages", tmp_path / "longer.yaml")
    assert run_cli(longer, log=log, method="dpo") == 2
    assert "stage_0_sft ended at iteration 4, from which" in log.read_text()


@pytest.mark.slow
def test_adapters_go_through_the_stages_and_the_last_one_writes_them(inputs: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = ["--hft-rotation", "independent", "--save-lora", tmp_path / "first", "--lora-rank", 4]
    words = words_of(inputs, tmp_path / "run", *options)
    run(words, log)
    assert "stage_1_dpo" in log.read_text().partition("exported the adapter to")[0]
    trained = load_file(tmp_path / "first" / "adapter_model.safetensors")
    run(words, log)
    assert "first already holds the adapter of iteration 3" in log.read_text()
    assert not changed_adapters(trained, tmp_path / "first")
    options[3:] = [tmp_path / "second", "--lora-adapter", tmp_path / "first"]
    run(words_of(inputs, tmp_path / "other", *options), log)
    assert log.read_text().count("adapters continue from --lora-adapter") == 1
    assert len(changed_adapters(trained, tmp_path / "second")) == len(trained)


def changed_adapters(before: dict[str, torch.Tensor], after: Path) -> list[str]:
    found = load_file(after / "adapter_model.safetensors")
    return [name for name, tensor in before.items() if not torch.equal(tensor, found[name])]


def test_every_stage_is_checked_before_the_first_is_trained(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "stages.yaml").write_text(
        STAGES.format(sft=inputs / "data.jsonl", dpo=inputs / "data.jsonl")  # conversations, and no pairs
    )
    words = words_of(inputs, tmp_path / "run", "--stages", tmp_path / "stages.yaml", "--check")
    assert run_cli(words, log=tmp_path / "log", method="dpo") == 2
    assert "24 records (" in (tmp_path / "log").read_text()
    assert (
        "the record has the keys `messages`, but a pair has `chosen` and `rejected`" in (tmp_path / "log").read_text()
    )
    assert not (tmp_path / "run").exists()


def test_a_file_of_options_holds_for_the_stages_of_other_commands_too(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("dpo_beta: -1\n")
    words = words_of(inputs, tmp_path / "run", "--config", tmp_path / "options.yaml", "--check")
    at = words.index("--dpo-reference")  # which `sft` doesn't have
    assert run_cli(words[:at] + words[at + 2 :], log=tmp_path / "log", method="sft") == 2
    assert "--dpo-beta -1.0: must be a number above 0" in (tmp_path / "log").read_text()
