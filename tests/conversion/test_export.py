"""What --save-hf writes: transformers loads it whole, and what rested is the source's. Run: pytest tests/conversion"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.model_shape import ModelShape, load_hf_config
from hft_megatron.conversion.kept_files import NewFolder
from hft_megatron.data.templates import BUILT_IN
from hft_megatron.data.tokenizer_loading import load_tokenizer
from hft_megatron.errors import EXIT_OK
from hft_megatron.hft.plan import make_plan
from hft_megatron.hft.units import units_of
from hft_megatron.model.parameters import parameter_slots
from tests.support.models import LAYOUTS, build_from_folder, make_llama
from tests.support.published_tokenizers import PUTS_BEGIN, PublishedTokenizers
from tests.support.ranks import RankPools
from tests.support.runs import VOCAB_SIZE, make_inputs, run_cli, run_sft_words, words_for
from tests.support.tokenizers import make_byte_level

SEED = 1234
ENDS = ("<|im_end|>", "<|pad|>")
"""The tokenizer's end token, and the one that a template of a test ends turns with."""
TP2 = ["--tensor-model-parallel-size", "2"]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="session")
def fp16_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("fp16"), "tied", torch.float16)


@pytest.fixture(scope="session")
def fp16_run(
    fp16_inputs: Path, ranks: RankPools, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder exported by two TP ranks that trained an fp16 model in bf16, and what rank 0 reported."""
    folder = tmp_path_factory.mktemp("fp16_out") / "out"
    words = words_for(fp16_inputs, "--train-iters", 3, "--bf16", *TP2, "--save-hf", folder)
    return folder, ranks(2).run(run_sft_words, words=words)[0]


def test_after_training_what_rested_is_the_source_and_what_trained_is_in_its_dtype(
    fp16_run: tuple[Path, dict[str, Any]], fp16_inputs: Path
) -> None:
    folder, report = fp16_run
    source = fp16_inputs / "model"
    shape = ModelShape.from_hf_config(load_hf_config(str(source)), "config.json")
    plan = make_plan(shape, HFTConfig(), default_seed=SEED)
    before, after = weights(source), weights(folder)
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    for unit in plan.units:
        name = f"{unit.name}.weight"
        assert torch.equal(before[name], after[name]) != plan.trains(unit.name), name
    said = [line for line in report["said"] if line.startswith("export:")]
    frozen = len(plan.units) - len(plan.training)
    assert len(said) == 1
    assert f"{frozen} frozen tensors are copied from {source}" in said[0]


def test_the_exported_folder_is_complete_for_transformers(
    fp16_run: tuple[Path, dict[str, Any]], fp16_inputs: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = fp16_run
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = AutoTokenizer.from_pretrained(fp16_inputs / "model")
    assert tokenizer("Say 1! bridge").input_ids == original("Say 1! bridge").input_ids
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id is None, "the source names none"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say 1"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert "Say 1" in tokenizer.decode(prompt["input_ids"][0])

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float16
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        made = model.float().generate(**prompt, max_new_tokens=3, do_sample=False)
    assert made.shape[1] > prompt["input_ids"].shape[1]


COPIED = ("llama3", "llama3.2", "smollm2")
"""Folders whose files every version of transformers takes as they stand."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PUTS_BEGIN)
def test_a_published_folder_comes_out_with_the_ids_that_were_trained(
    ranks: RankPools, tmp_path: Path, name: str
) -> None:
    """Folder in, two steps, folder out; llama2's has a pad token more than its model has rows."""
    from hft_megatron.data.tokenizer_export import TransformersView

    model = PublishedTokenizers(tmp_path).path(name)
    tokenizer = load_tokenizer(None, model)
    make_llama(model, vocab_size=tokenizer.vocab_size)
    extra = name == "llama2"
    if extra:
        (model / "added_tokens.json").write_text(json.dumps({"<pad>": tokenizer.vocab_size}))
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<pad>"}))
    rows = [{"prompt": f"What is {number}?", "completion": " A number."} for number in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--load-hf", model, "--train-data-path", tmp_path / "data.jsonl", "--seq-length", 64, "--lr", 1e-3]
    words += ["--train-iters", 2, "--global-batch-size", 4, "--lr-warmup-iters", 1, "--no-bf16"]
    [report] = ranks(1).run(run_sft_words, words=[*map(str, words), "--save-hf", str(tmp_path / "out")])
    assert len(report["steps"]) == 2
    assert any("replaces it, also in the export" in line for line in report["said"]) == extra
    assert any(line.startswith("tokenizer files written") for line in report["said"]) == (name not in COPIED)
    assert TransformersView(tmp_path / "out").difference(tokenizer) is None
    written = json.loads((tmp_path / "out/config.json").read_text())
    if extra or tokenizer.facts.names_pad:
        assert written["pad_token_id"] == tokenizer.pad_id < written["vocab_size"]
    else:
        assert written["pad_token_id"] is None
    assert written["bos_token_id"] == tokenizer.facts.named_id("bos_token")


def test_generation_stops_at_the_end_of_a_turn_too(ranks: RankPools, tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    template = tmp_path / "turns.jinja"
    template.write_text(BUILT_IN["chatml"].replace("<|im_end|>", "<|pad|>"))
    words = words_for(inputs, "--train-iters", 0, "--chat-template", template, "--save-hf", tmp_path / "out")
    ranks(1).run(run_sft_words, words=words)
    ids = {token.content: token.id for token in load_tokenizer(None, tmp_path / "out").facts.special_tokens}
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text())["eos_token_id"] == [ids[token] for token in ENDS]
    assert (tmp_path / "out/chat_template.jinja").read_text() == template.read_text()


def test_the_logits_of_the_export_are_those_of_the_run(
    ranks: RankPools, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The exported fp32 model, trained on once more without updates, starts at the loss where the run ended."""
    inputs = make_inputs(tmp_path)
    constant = ["--lr-decay-style", "constant", "--lr-warmup-iters", "0", "--global-batch-size", "24"]
    words = words_for(inputs, *constant, "--train-iters", 3, "--save-hf", tmp_path / "out")
    [first] = ranks(1).run(run_sft_words, words=words)
    again = words_for(inputs, *constant, "--train-iters", 1, "--load-hf", tmp_path / "out", "--lr", 0)
    longer = words_for(inputs, *constant, "--train-iters", 4)
    [restarted] = ranks(1).run(run_sft_words, words=again)
    [whole] = ranks(1).run(run_sft_words, words=longer)
    assert whole["steps"][:3] == first["steps"]
    # One step sees all 24 examples, in another order.
    assert restarted["steps"][0]["loss"] == pytest.approx(whole["steps"][3]["loss"], rel=1e-5)
    assert restarted["steps"][0]["loss"] < first["steps"][0]["loss"] - 0.5


@pytest.mark.parametrize("save_dtype", [None, "bfloat16", "float32"])
def test_converting_without_training_keeps_every_bit_unless_asked(
    save_dtype: str | None, ranks: RankPools, fp16_inputs: Path, tmp_path: Path
) -> None:
    source = fp16_inputs / "model"
    asked = [] if save_dtype is None else ["--save-dtype", save_dtype]
    words = ["--train-iters", "0", "--load-hf", str(source), "--save-hf", str(tmp_path / "out"), "--bf16", *asked]
    ranks(1).run(run_sft_words, words=words)
    dtype = torch.float16 if save_dtype is None else getattr(torch, save_dtype)
    before, after = weights(source), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], tensor.to(dtype)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == str(dtype).removeprefix("torch.")
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_failed_export_leaves_no_folder_that_looks_complete(
    ranks: RankPools, fp16_inputs: Path, tmp_path: Path
) -> None:
    words = ["--train-iters", "0", "--load-hf", str(fp16_inputs / "model"), "--save-hf", str(tmp_path / "out")]
    assert ranks(1).run(run_and_fail_before_tokenizer, words=words) == [True]
    assert not (tmp_path / "out").exists()
    ranks(1).run(run_sft_words, words=words)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class ExportDied(Exception):
    pass


def run_and_fail_before_tokenizer(words: list[str]) -> bool:
    from unittest.mock import patch

    from hft_megatron.data.huggingface_tokenizer import HuggingFaceTokenizer

    with patch.object(HuggingFaceTokenizer, "export", side_effect=ExportDied):
        try:
            run_sft_words(words)
        except ExportDied:
            return True
    return False


def test_one_command_on_one_process_converts_a_folder(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "model", vocab_size=VOCAB_SIZE)
    make_byte_level(source)
    words = ["--train-iters", "0", "--load-hf", str(source), "--save-hf", str(tmp_path / "out"), "--no-bf16"]
    log = tmp_path / "log"
    assert run_cli(words, log=log) == EXIT_OK, log.read_text()
    before, after = weights(source), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert re.search(r"^exported the model to .*/out in Hugging Face's format \(float32\)$", log.read_text(), re.M)
    assert "Warning" not in log.read_text()


def test_what_any_round_trained_is_exported_and_not_the_last_ones_alone(ranks: RankPools, tmp_path: Path) -> None:
    """In bf16 a tensor frozen in the last round would otherwise be copied from the fp32 source, its training lost."""
    inputs = make_inputs(tmp_path / "inputs")
    rounds = ["--hft-round-interval", 2, "--hft-rotation", "complementary", "--lr-warmup-iters", 0, "--train-iters", 4]
    save = ["--save", tmp_path / "run", "--load", tmp_path / "run"]
    ranks(1).run(run_sft_words, words=words_for(inputs, "--bf16", *rounds, *save, "--save-hf", tmp_path / "trained"))
    source, trained = weights(inputs / "model"), weights(tmp_path / "trained")
    assert [name for name, tensor in source.items() if torch.equal(tensor, trained[name])] == []
    converted = words_for(inputs, "--bf16", *rounds, *save, "--train-iters", 0, "--save-hf", tmp_path / "converted")
    ranks(1).run(run_sft_words, words=converted)
    again = weights(tmp_path / "converted")
    assert [name for name, tensor in trained.items() if not torch.equal(tensor, again[name])] == []


def run_in_order(source: str, output: str) -> dict[str, Any]:
    """Exports at two pipeline stages; ``taken`` and ``sent``: unit -> when rank 0 took it and rank 1 sent it.

    Times are numbers that the store gives out, one after the other.
    """
    import torch.distributed as dist

    from hft_megatron.conversion import export, save

    chunks, shape, placement = build_from_folder(source, LAYOUTS["pp2"])
    rules = save.ExportRules(source=source, trained=frozenset(), save_dtype=None)
    store, gathered, send = dist.distributed_c10d._get_default_store(), save.gathered_weights, dist.send
    answer: dict[str, Any] = {"taken": {}, "sent": {}, "finished sends": 0}
    units = [unit.name for unit in units_of(shape)]
    mine = [unit for unit in units if unit in {slot.unit for slot in parameter_slots(chunks)}]

    def taking(*arguments: Any) -> Iterator[tuple[str, Tensor]]:
        for unit, whole in gathered(*arguments):
            answer["taken"][unit] = store.add("export", 1)
            yield unit, whole

    def sending(tensor: Tensor, to: int) -> None:
        answer["sent"][mine[len(answer["sent"])]] = store.add("export", 1)
        send(tensor, to)

    def finish() -> None:
        answer["finished sends"] += 1

    with (
        patch.object(export, "gathered_weights", taking),
        patch.object(dist, "send", sending),
        patch.object(torch.cuda, "synchronize", finish),
    ):
        export.export_folder(NewFolder(target=Path(output)), chunks, shape, placement, rules, None, print)
        answer["complete"] = (Path(output) / "model.safetensors").exists()
    return answer | {"units": units}


def test_no_rank_sends_a_matrix_before_the_first_has_written_the_one_before(ranks: RankPools, tmp_path: Path) -> None:
    source = str(make_llama(tmp_path / "model"))
    first, second = ranks(2).run(run_in_order, source=source, output=str(tmp_path / "out"))
    units, taken, sent = first["units"], first["taken"], second["sent"]
    assert list(taken) == units
    assert 10 < len(sent) < len(units)
    for unit, number in sent.items():
        assert taken[units[units.index(unit) - 1]] < number < taken[unit]
    assert second["finished sends"] == len(sent)
    assert second["complete"], "no rank returns before the folder is there"
