"""--finetune: a new run from the weights of another. Run: pytest tests/checkpoint/test_finetune.py"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.test_verification import run_refused
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for, write_data


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="session")
def first_run(ranks: RankPools, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, with the exported model beside the run; its checkpoint leaves frozen weights out."""
    folder = tmp_path_factory.mktemp("first")
    words = words_for(inputs, "--save", folder / "run", "--save-hf", folder / "model", "--save-trained-only")
    ranks(2).run(run_sft_words, words=words)
    return folder


def new_run(inputs: Path, first: Path, *options: object) -> list[str]:
    return words_for(inputs, "--hft-ratio", 0.25, "--hft-seed", 5, "--seed", 9, "--load", first / "run", *options)


def test_a_new_run_starts_with_the_weights_alone_at_any_layout_and_ratio(
    ranks: RankPools, inputs: Path, first_run: Path, tmp_path: Path
) -> None:
    """It is the run from the exported folder: other plan, seed and data, moments and schedule from the beginning."""
    data = write_data(tmp_path / "other.jsonl", 31)
    pp2 = ["--pipeline-model-parallel-size", "2", "--train-data-path", data]
    from_folder = words_for(inputs, "--hft-ratio", 0.25, "--hft-seed", 5, "--seed", 9, *pp2)
    from_folder += ["--load-hf", str(first_run / "model")]
    asked = new_run(inputs, first_run, *pp2, "--finetune", "--save", tmp_path / "run")
    whole = ranks(2).run(run_sft_words, words=from_folder)
    found = ranks(2).run(run_sft_words, words=asked)
    for rank in range(2):
        assert found[rank]["steps"] == whole[rank]["steps"]
        assert found[rank]["state"] == whole[rank]["state"]
    assert "starting a new run from them" in "\n".join(found[0]["said"])


@pytest.mark.slow
def test_a_new_run_that_has_begun_resumes_and_does_not_begin_again(
    ranks: RankPools, inputs: Path, first_run: Path, tmp_path: Path
) -> None:
    words = new_run(inputs, first_run, "--finetune", "--save", tmp_path / "run")
    whole = ranks(1).run(run_sft_words, words=new_run(inputs, first_run, "--finetune"))[0]
    [first] = ranks(1).run(run_sft_words, words=words, kill_at=2)
    [second] = ranks(1).run(run_sft_words, words=words)
    assert first["steps"] + second["steps"] == whole["steps"]
    assert second["state"] == whole["state"]
    assert any("already holds this run; resuming it" in line for line in second["said"])


def test_what_another_run_changed_is_exported_and_the_source_has_only_what_both_rested(
    ranks: RankPools, inputs: Path, first_run: Path, tmp_path: Path
) -> None:
    """The run's bf16 cannot hold the --load-hf folder's fp32, and its plan doesn't say what the other run changed."""
    words = new_run(inputs, first_run, "--finetune", "--train-iters", 0, "--save-hf", tmp_path / "out")
    ranks(1).run(run_sft_words, words=[*words, "--bf16"])
    folders = (inputs / "model", first_run / "model", tmp_path / "out")
    source, first, out = (load_file(folder / "model.safetensors") for folder in folders)
    changed = {name for name in first if not torch.equal(first[name].bfloat16(), source[name].bfloat16())}
    assert 0 < len(changed) < len(first)
    for name, tensor in out.items():
        assert torch.equal(tensor, first[name].bfloat16().float() if name in changed else source[name]), name


def test_a_new_run_whose_checkpoint_is_gone_is_not_begun_again(
    ranks: RankPools, inputs: Path, first_run: Path, tmp_path: Path
) -> None:
    words = new_run(inputs, first_run, "--finetune", "--save", tmp_path / "run", "--keep-last", 1)
    ranks(1).run(run_sft_words, words=words)
    (tmp_path / "run" / "iter_0000006" / "digests.json").unlink()
    [said] = ranks(1).run(run_refused, words=words)
    assert "is incomplete (or of an earlier version)" in said
    assert (tmp_path / "run" / "iter_0000006" / "common.pt").exists()


@pytest.mark.slow
def test_a_new_run_resumes_only_with_the_weights_it_began_with(
    ranks: RankPools, inputs: Path, first_run: Path, tmp_path: Path
) -> None:
    words = new_run(inputs, first_run, "--save", tmp_path / "run")
    ranks(1).run(run_sft_words, words=[*words, "--finetune"])
    other = [*words, "--finetune", "--load", str(tmp_path / "other")]
    [said] = ranks(1).run(run_refused, words=other)
    assert f"its --load of --finetune is {first_run / 'run'}, but this command's is {tmp_path / 'other'}" in said
    [again] = ranks(1).run(run_sft_words, words=[*words, "--load", str(tmp_path / "run")])
    assert again["steps"] == []
    [said] = ranks(1).run(run_refused, words=other)
    assert "its --load of --finetune is" in said


def test_what_contradicts_the_checkpoint_is_one_sentence_with_both_values(
    ranks: RankPools, inputs: Path, first_run: Path, tmp_path: Path
) -> None:
    run = first_run / "run"

    def refusal(*options: object) -> str:
        [said] = ranks(1).run(run_refused, words=words_for(inputs, "--load", run, *options))
        return str(said)

    said = refusal("--hft-ratio", 0.25)
    assert "its --hft-ratio is 0.5, but this command's is 0.25" in said
    assert said.endswith(f"to start a new run from its weights, give --load {run} --finetune with another --save.")
    said = refusal("--seq-length", 80)
    assert "its --seq-length is 96, but this command's is 80" in said
    assert refusal("--load", inputs / "data.jsonl").endswith("data.jsonl is a file; give the --save folder of a run.")
    said = refusal("--load", run / "iter_0000006")
    assert f"iter_0000006 is a single checkpoint; give the folder of its run, {run}, whose newest checkpoint" in said
    said = refusal("--train-data-path", write_data(tmp_path / "other.jsonl", 5))
    assert f"its training data is {inputs / 'data.jsonl'} (digest " in said
    other = make_inputs(tmp_path / "other", hidden_size=32)
    said = refusal("--load-hf", other / "model", "--finetune", "--save", tmp_path / "new")
    assert "whose model's hidden size is 64, but this command's is 32; give the same model." in said


def test_another_tokenizer_is_refused_with_both_paths(
    ranks: RankPools, inputs: Path, first_run: Path, tmp_path: Path
) -> None:
    from tests.support.tokenizers import make_byte_level

    other = tmp_path / "tokenizer"
    other.mkdir()
    make_byte_level(other)
    content = json.loads((other / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["!"], ids["#"] = ids["#"], ids["!"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    words = words_for(inputs, "--load", first_run / "run", "--tokenizer-model", other)
    [said] = ranks(1).run(run_refused, words=words)
    assert f"its tokenizer is {inputs / 'model'} (digest " in said
    assert f"but this command's is {other} (digest " in said


def test_without_a_checkpoint_to_take_weights_from_nothing_starts(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    words = words_for(inputs, "--load", tmp_path, "--finetune")
    [said] = ranks(1).run(run_refused, words=words)
    assert f"--finetune takes the weights of --load {tmp_path}, which holds no complete checkpoint" in said


CARRIED = {
    "dp2 bf16, all of them": ["--bf16", "--hft-frozen-moments", "host"],
    # One norm's, of which the first stage has nothing.
    "pp2, few": [
        *("--no-bf16", "--pipeline-model-parallel-size", "2", "--hft-rotation", "complementary"),
        *("--hft-freeze-embedding", "--hft-freeze-head"),
    ],
}


@pytest.mark.slow(reason="four runs")
@pytest.mark.parametrize("case", CARRIED)
def test_the_next_round_as_a_run_of_its_own_takes_the_moments_that_a_switch_would_carry(
    ranks: RankPools, inputs: Path, tmp_path: Path, case: str
) -> None:
    rows = tmp_path / "data.jsonl"
    rows.write_text((inputs / "data.jsonl").read_text().splitlines(keepends=True)[1] * 4)  # in whatever order
    options = ["--train-data-path", rows, *CARRIED[case], "--hft-moments", "carry"]
    options += ["--lr-decay-style", "constant", "--lr-warmup-iters", 0]
    once = words_for(inputs, *options, "--hft-round-interval", 3)
    first = words_for(inputs, *options, "--hft-first-round", 0, "--train-iters", 3, "--save", tmp_path / "run")
    second = words_for(inputs, *options, "--hft-first-round", 1, "--train-iters", 3, "--load", tmp_path / "run")
    second.append("--finetune")
    whole, before, after, fresh = (
        ranks(2).run(run_sft_words, words=words) for words in (once, first, second, [*second, "--no-load-optim"])
    )
    assert "moments of" in "\n".join(after[0]["said"])
    for rank in range(2):
        steps = [[(step["loss"], step["grad_norm"]) for step in one[rank]["steps"]] for one in (whole, before, after)]
        assert steps[1] + steps[2] == steps[0]
        assert after[rank]["state"] == whole[rank]["state"]
        assert fresh[rank]["state"] != whole[rank]["state"]
    if "bf16" in case:
        for said in ranks(2).run(run_refused, words=[*second, "--no-bf16"]):
            assert "was trained in another data type, whose moments don't fit" in said
