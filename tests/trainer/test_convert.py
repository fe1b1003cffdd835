"""A checkpoint converted by one process is what the run's own export wrote. Run: pytest tests/trainer"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hft_megatron.config.export_folder import EXPORTS_FILE
from hft_megatron.errors import UserError
from hft_megatron.trainer.convert import convert_checkpoint
from tests.support.ranks import RankPools
from tests.support.runs import VOCAB_SIZE, make_inputs, run_sft_words, words_for
from tests.support.tiers import quick

TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
ROUNDS = ["--hft-round-interval", "2", "--hft-rotation", "complementary"]
SPECTRUM = ["--hft-selection", "spectrum", "--hft-round-interval", "epoch", "--hft-lr-schedule", "round"]

CASES: dict[str, tuple[int, str, torch.dtype, list[str]]] = {
    "tp2 of a padded vocabulary": (2, "gqa", torch.float32, [*TP2, "--no-bf16", "--chat-template", "chatml"]),
    "tp2 bf16 from fp16": (2, "gqa", torch.float16, [*TP2, "--bf16"]),
    "pp2 tied from bf16": (2, "tied", torch.bfloat16, [*PP2, "--bf16"]),
    "pp2 vpp of a mistral": (
        2,
        "mistral",
        torch.float32,
        [*PP2, "--num-layers-per-virtual-pipeline-stage", "1", "--no-bf16"],
    ),
    "dp2 bf16, rounds": (2, "llama3_rope", torch.float32, ["--bf16", *ROUNDS]),
    "dp2 bf16, carried moments": (
        2,
        "gqa",
        torch.float32,
        ["--bf16", *ROUNDS, "--hft-moments", "carry", "--hft-frozen-moments", "host"],
    ),
    "tp2 bf16, trained weights only": (2, "gqa", torch.float16, [*TP2, "--bf16", "--save-trained-only"]),
    "dp2 bf16, trained weights of rounds only": (
        2,
        "tied",
        torch.float32,
        ["--bf16", *ROUNDS, "--save-trained-only", "--save-interval", "1"],
    ),
    "spectrum over epochs": (
        1,
        "gqa",
        torch.float32,
        ["--bf16", *SPECTRUM, "--hft-rotation", "complementary", "--global-batch-size", "12"],
    ),
}
"""World size, model, its data type and the run's options."""

QUICK = ["tp2 of a padded vocabulary", "pp2 tied from bf16", "dp2 bf16, rounds"]


def convert(load: Path, save_hf: Path, *, iteration: int | None = None, save_dtype: Any = None) -> list[str]:
    """Converts in this process; what was announced."""
    said: list[str] = []
    convert_checkpoint(str(load), iteration, str(save_hf), save_dtype=save_dtype, check=False, announce=said.append)
    return said


def files(folder: Path) -> dict[str, bytes]:
    """Those of the model, without the note of the run that exported it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != EXPORTS_FILE}


def train(ranks: RankPools, folder: Path, case: str, *more: object) -> tuple[Path, Path]:
    """(the run's folder, what it exported itself) after four steps."""
    world_size, variant, dtype, options = CASES[case]
    inputs = make_inputs(folder, variant, dtype)
    words = words_for(inputs, "--train-iters", 4, "--lr-warmup-iters", 0, *options, *more)
    ranks(world_size).run(
        run_sft_words, words=[*words, "--save", str(folder / "run"), "--save-hf", str(folder / "own")]
    )
    return folder / "run", folder / "own"


@pytest.mark.parametrize("case", quick(CASES, QUICK))
def test_every_file_is_the_one_that_the_run_exported(case: str, ranks: RankPools, tmp_path: Path) -> None:
    run, own = train(ranks, tmp_path, case)
    convert(run, tmp_path / "out")
    expected, found = files(own), files(tmp_path / "out")
    assert len(expected) >= 5
    assert found == expected
    asks = "--chat-template" in CASES[case][3]  # the default is no template that writes this
    assert (b"'<|im_start|>' + message['role']" in found["chat_template.jinja"]) == asks


@pytest.fixture(scope="session")
def fp16_run(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bf16 run of an fp16 model, a checkpoint after every second step."""
    folder = tmp_path_factory.mktemp("fp16")
    train(ranks, folder, "tp2 bf16 from fp16", "--save-interval", 2)
    return folder


def test_an_earlier_checkpoint_and_another_data_type_can_be_asked_for(fp16_run: Path, tmp_path: Path) -> None:
    convert(fp16_run / "run", tmp_path / "out", iteration=2, save_dtype="float32")
    own, found = (load_file(folder / "model.safetensors") for folder in (fp16_run / "own", tmp_path / "out"))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    differ = {name for name in own if not torch.equal(own[name].float(), found[name])}
    plan = json.loads((fp16_run / "run" / "iter_0000002" / "plan.json").read_text())
    assert differ == {f"{unit['name']}.weight" for unit in plan["units"] if unit["trains"]}


def test_without_the_source_the_weights_are_the_checkpoints_and_that_is_said(fp16_run: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    source, aside = fp16_run / "model", fp16_run / "aside"
    source.rename(aside)
    try:
        said = convert(fp16_run / "run", tmp_path / "out")
    finally:
        aside.rename(source)
    assert any(f"--load-hf {source} does not exist" in line and "bfloat16" in line for line in said)
    assert any("tokenizer no longer exists" in line for line in said)
    own, found = (load_file(folder / "model.safetensors") for folder in (fp16_run / "own", tmp_path / "out"))
    assert own.keys() == found.keys()
    plan = json.loads((fp16_run / "run" / "iter_0000004" / "plan.json").read_text())
    for unit in plan["units"]:
        name = f"{unit['name']}.weight"
        assert found[name].dtype == torch.bfloat16
        # What trained was rounded to the source's fp16 in the run's export, what stayed frozen is the source's there.
        same = (
            torch.equal(found[name].half(), own[name])
            if unit["trains"]
            else torch.equal(found[name], own[name].bfloat16())
        )
        assert same, name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(tmp_path / "out").vocab_size == VOCAB_SIZE


def change_the_source(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[8 + length] ^= 1  # the first entry of the first tensor
    path.write_bytes(bytes(data))


def remove_a_shard_file(folder: Path) -> None:
    next((folder / "run" / "iter_0000004").glob("__0_*.distcp")).unlink()


def change_the_index(folder: Path) -> None:
    """What would be executed if it were opened."""
    path = folder / "run" / "iter_0000004" / ".metadata"
    path.write_bytes(b"cos\nabort\n(tR." + path.read_bytes()[14:])


def flip_a_bit_of_every_shard_file(folder: Path) -> None:
    for path in (folder / "run" / "iter_0000004").glob("*.distcp"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))


def break_the_digests(folder: Path) -> None:
    (folder / "run" / "iter_0000004" / "digests.json").write_text("[")


def remove_the_newest(folder: Path) -> None:
    shutil.rmtree(folder / "run" / "iter_0000004")


def remove_the_identity(folder: Path) -> None:
    (folder / "run" / "run_identity.json").unlink()


def leave_no_digests(folder: Path) -> None:
    for path in (folder / "run").glob("iter_*/digests.json"):
        path.unlink()


def name_a_template_that_is_gone(folder: Path) -> None:
    path = folder / "run" / "resolved_config.yaml"
    text = path.read_text()
    assert "chat_template: null" in text
    path.write_text(text.replace("chat_template: null", "chat_template: gone.jinja"))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (change_the_source, "which now holds other weights"),
        (remove_a_shard_file, ".distcp is missing"),
        (change_the_index, ".metadata is not as it was saved"),
        (flip_a_bit_of_every_shard_file, ".distcp is not as it was saved"),
        (break_the_digests, "iter_0000004/digests.json cannot be read"),
        (remove_the_newest, "choose another iteration: 2."),
        (remove_the_identity, "run_identity.json, the identity of the run, cannot be read"),
        (leave_no_digests, "holds no complete checkpoint"),
        (name_a_template_that_is_gone, "trained with --chat-template gone.jinja, which does not exist; put the file"),
    ],
)
def test_a_run_that_cannot_be_converted_is_one_sentence(
    break_it: Any, said: str, fp16_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(fp16_run, tmp_path / "copy")
    resolved = tmp_path / "copy" / "run" / "resolved_config.yaml"
    resolved.write_text(resolved.read_text().replace(str(fp16_run), str(tmp_path / "copy")))
    break_it(tmp_path / "copy")
    with pytest.raises(UserError) as error:
        convert(tmp_path / "copy" / "run", tmp_path / "out")
    message = str(error.value)
    assert said in message
    assert str(tmp_path / "copy" / "run") in message
    assert "\n" not in message
    assert message.endswith(".")
    assert not (tmp_path / "out").exists()


def test_what_was_left_out_of_a_checkpoint_must_be_where_it_was(ranks: RankPools, tmp_path: Path) -> None:
    run, _ = train(ranks, tmp_path, "dp2 bf16, trained weights of rounds only")
    for iteration in (1, 3, 4):
        convert(run, tmp_path / f"out{iteration}", iteration=iteration)
    shutil.rmtree(run / "iter_0000003")
    gone = r"iter_0000004 holds only the weights trained in its round .* its base \S+iter_0000003 cannot be read"
    with pytest.raises(UserError, match=gone):
        convert(run, tmp_path / "out")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(UserError, match="iter_0000001 holds only the weights trained in its round, but --load-hf"):
        convert(run, tmp_path / "out", iteration=1)


@pytest.mark.slow
def test_a_run_on_another_runs_weights_is_exported_with_them_also_when_it_was_resumed(
    ranks: RankPools, tmp_path: Path
) -> None:
    """Frozen weights are the source's where they were frozen in the other run too, and the other run's elsewhere."""
    first, exported_first = train(ranks, tmp_path, "tp2 bf16 from fp16")
    options = ["--bf16", *TP2, "--lr-warmup-iters", 0, "--load", first, "--finetune", "--save", tmp_path / "second"]
    options += ["--hft-seed", 77, "--lr-decay-style", "constant"]
    before, middle = (
        load_file(tmp_path / "model" / "model.safetensors"),
        load_file(exported_first / "model.safetensors"),
    )
    for iterations in (2, 3):
        words = words_for(tmp_path, "--train-iters", iterations, *options, "--save-hf", tmp_path / f"own{iterations}")
        ranks(2).run(run_sft_words, words=words)
        convert(tmp_path / "second", tmp_path / f"out{iterations}")
        assert files(tmp_path / f"out{iterations}") == files(tmp_path / f"own{iterations}")
        after = load_file(tmp_path / f"own{iterations}" / "model.safetensors")
        plan = json.loads((tmp_path / "second" / f"iter_000000{iterations}" / "plan.json").read_text())
        frozen = [f"{unit['name']}.weight" for unit in plan["units"] if not unit["trains"]]
        assert all(torch.equal(after[name], middle[name]) for name in frozen)
        assert {torch.equal(after[name], before[name]) for name in frozen} == {True, False}
