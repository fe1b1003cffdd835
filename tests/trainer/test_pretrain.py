"""Pre-training beside the rows of the run matrix: samples, validation, other corpora, mock data.

Run: pytest tests/trainer/test_pretrain.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hft_megatron.errors import UserError
from tests.support.corpora import random_documents, write_corpus
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, read_metrics, run_cli, run_method_words
from tests.support.toy_training import GLOBAL_BATCH, OPTIMIZER, SEED, STEPS, TINY

LENGTH = 32
TOLERANCE = 1e-5
"""Relative."""
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
ROUNDS = ["--hft-round-interval", "2", "--hft-moments", "carry"]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, and the corpora ``a`` and ``b``, of about 70 and 25 samples."""
    folder = make_inputs(tmp_path_factory.mktemp("pretrain"), **TINY)
    write_corpus(folder / "a", random_documents(80, vocab_size=40))
    write_corpus(folder / "b", random_documents(30, seed=1, vocab_size=40))
    return folder


def words_for(inputs: Path, *options: object) -> list[str]:
    """The words of a run with the reference's optimizer; later options override earlier ones."""
    words = ["--load-hf", inputs / "model", "--data-path", 0.7, inputs / "a", 0.3, inputs / "b", "--split", "90,10"]
    words += ["--seq-length", LENGTH, "--global-batch-size", GLOBAL_BATCH, "--train-iters", STEPS, "--seed", SEED]
    words += ["--lr", OPTIMIZER.lr, "--min-lr", OPTIMIZER.min_lr, "--lr-warmup-iters", OPTIMIZER.lr_warmup_iters]
    words += ["--weight-decay", OPTIMIZER.weight_decay, "--clip-grad", OPTIMIZER.clip_grad, "--no-bf16", "--hft-audit"]
    return [str(word) for word in (*words, *options)]


def column(value: dict[str, Any], name: str) -> list[Any]:
    return [step[name] for step in value["steps"]]


def run_in_two(
    ranks: RankPools, worlds: tuple[int, int], words: tuple[list[str], list[str]], folder: Path, kill_at: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Results of the ranks of a run that stopped after ``kill_at``, and of the one that resumed it."""
    saved = ["--save", str(folder), "--load", str(folder)]
    first = ranks(worlds[0]).run(run_method_words, method="pretrain", words=[*words[0], *saved], kill_at=kill_at)
    assert first[0]["stopped"] is not None
    return first, ranks(worlds[1]).run(run_method_words, method="pretrain", words=[*words[1], *saved])


@pytest.mark.parametrize("worlds", [(1, 2), pytest.param((2, 1), marks=pytest.mark.slow)])
def test_a_run_resumes_with_the_same_samples_on_another_number_of_ranks(
    worlds: tuple[int, int], ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    words = words_for(inputs, "--train-iters", 6, "--lr-warmup-iters", 2)
    sizes = {1: ["--micro-batch-size", "4"], 2: ["--micro-batch-size", "1"]}
    [whole] = ranks(1).run(run_method_words, method="pretrain", words=words)
    both = tuple([*words, *sizes[world]] for world in worlds)
    first, second = run_in_two(ranks, worlds, (both[0], both[1]), tmp_path, kill_at=3)
    steps = first[0]["steps"] + second[0]["steps"]
    assert [step["consumed"] for step in steps] == column(whole, "consumed")
    assert [step["loss"] for step in steps] == pytest.approx(column(whole, "loss"), rel=TOLERANCE)
    assert len({round(step["loss"], 4) for step in steps}) == 6, "other samples would show in the losses"


@pytest.mark.slow
def test_more_iterations_continue_while_the_order_is_the_same_and_are_refused_where_it_is_not(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    words = words_for(
        inputs, "--data-path", inputs / "a", "--lr-decay-style", "constant", "--train-iters", 6, "--lr-warmup-iters", 2
    )
    saved = ["--save", str(tmp_path), "--load", str(tmp_path)]
    [whole] = ranks(1).run(run_method_words, method="pretrain", words=words)
    [first] = ranks(1).run(run_method_words, method="pretrain", words=[*words, *saved, "--train-iters", "3"])
    [second] = ranks(1).run(run_method_words, method="pretrain", words=[*words, *saved])
    assert first["steps"] + second["steps"] == whole["steps"]
    [sentence] = ranks(1).run(run_to_a_mistake, words=[*words, *saved, "--train-iters", "100"])
    assert "holds another run: its order of samples is the one for --train-iters 6 (digest" in sentence
    assert "but this command's is the one for --train-iters 100 (digest" in sentence


def run_to_a_mistake(words: list[str]) -> str:
    try:
        run_method_words("pretrain", words)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--split", "80,20"], "its --split is 90,10, but this command's is 80,20"),
        (["--data-path", "0.6", "A", "0.4", "B"], "its training data is 0.7 "),
        (["--seed", "8"], "its --seed is 7, but this command's is 8"),
        (["--reset-attention-mask"], "its --reset-attention-mask is False, but this command's is True"),
        (["--eod-mask-loss"], "its --eod-mask-loss is False, but this command's is True"),
        (["--seq-length", "16"], "its --seq-length is 32, but this command's is 16"),
    ],
)
def test_another_corpus_split_or_seed_is_another_run(
    options: list[str], sentence: str, ranks: RankPools, inputs: Path, saved_run: Path
) -> None:
    options = [{"A": str(inputs / "a"), "B": str(inputs / "b")}.get(word, word) for word in options]
    words = words_for(inputs, "--train-iters", 1, "--lr-warmup-iters", 0, "--load", saved_run, *options)
    [said] = ranks(1).run(run_to_a_mistake, words=words)
    assert sentence in said


@pytest.fixture(scope="session")
def saved_run(ranks: RankPools, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    words = words_for(inputs, "--train-iters", 1, "--lr-warmup-iters", 0, "--save", folder)
    ranks(1).run(run_method_words, method="pretrain", words=words)
    return folder


def test_validation_goes_through_its_part_of_the_corpus(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    """With a rate of zero two validations differ by their samples alone."""
    words = words_for(inputs, "--train-iters", 5, "--lr", 0, "--min-lr", 0, "--eval-interval", 2, "--eval-iters", 1)
    seen = []
    for world_size in (1, 2):
        save = tmp_path / str(world_size)
        ranks(world_size).run(run_method_words, method="pretrain", words=[*words, "--save", str(save)])
        lines = [line for line in read_metrics(save) if "lm loss validation" in line]
        assert [line["iteration"] for line in lines] == [2, 4, 5]
        seen.append([line["lm loss validation"] for line in lines])
    assert seen[0] == pytest.approx(seen[1], rel=TOLERANCE)
    assert len(set(seen[0])) == 3


@pytest.mark.parametrize("apart", [False, True], ids=["--split", "--valid-data-path"])
def test_a_corpus_validates_before_the_first_step_and_without_one(
    ranks: RankPools, inputs: Path, tmp_path: Path, apart: bool
) -> None:
    """With a rate of zero, so that all differ by their samples alone."""
    words = words_for(inputs, "--lr", 0, "--min-lr", 0, "--lr-warmup-iters", 0, "--eval-interval", 2)
    words += ["--eval-iters", "1"]
    place = words.index("--data-path")
    valid = ["--valid-data-path", str(inputs / "b")] if apart else []
    train = ["--train-data-path", str(inputs / "a")] if apart else words[place : place + 7]
    without = [*words[:place], *words[place + 7 :], *valid]

    def validated(save: str, *options: str) -> list[tuple[int, float]]:
        given = [*without, *options, "--save", str(tmp_path / save)]
        ranks(1).run(run_method_words, method="pretrain", words=given)
        lines = read_metrics(tmp_path / save)
        name = "lm loss validation"
        return [(line["iteration"], line[name]) for line in lines if name in line]

    start, first, second = validated("run", *train, "--train-iters", "4", "--eval-on-start")
    assert [start[0], first[0], second[0]] == [0, 2, 4]
    assert start[1] == first[1] != second[1]
    # Of a corpus that is gone through more than once, how often decides the order.
    same = [start] if apart else [(0, pytest.approx(start[1], rel=0.05))]
    nothing = [*(() if apart else train), "--train-iters", "0"]
    assert validated("nothing", *nothing) == same
    loaded = validated("nothing", *nothing, "--load", str(tmp_path / "run"))
    assert loaded[1:] == [(4, pytest.approx(loaded[0][1], rel=1e-12))]


@pytest.mark.slow
def test_sources_of_their_own_for_training_and_validation_are_the_same_run_as_one_that_is_not_divided(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    """With indices that are kept, at two ranks, and resumed at one by the other options, without the folder."""
    base = words_for(inputs, "--train-iters", 6, "--lr-warmup-iters", 2)
    place = base.index("--data-path")
    without = [*base[:place], *base[base.index("--seq-length") :]]
    whole_words = [*without, "--data-path", str(inputs / "a"), "--split", "1"]
    apart = [*without, "--train-data-path", str(inputs / "a"), "--data-cache-path", str(tmp_path / "kept")]
    apart += ["--valid-data-path", "0.5", str(inputs / "a"), "0.5", str(inputs / "b")]
    apart += ["--eval-interval", "3", "--eval-iters", "1"]
    [whole] = ranks(1).run(run_method_words, method="pretrain", words=whole_words)
    first, second = run_in_two(ranks, (2, 1), (apart, whole_words), tmp_path / "run", kill_at=3)
    steps = first[0]["steps"] + second[0]["steps"]
    assert [step["loss"] for step in steps] == pytest.approx(column(whole, "loss"), rel=TOLERANCE)
    validated = [line for line in read_metrics(tmp_path / "run") if "lm loss validation" in line]
    assert [line["iteration"] for line in validated] == [3]
    assert f"> indices of samples are kept in {tmp_path / 'kept'}" in first[0]["said"]
    assert len([entry for entry in (tmp_path / "kept").iterdir() if entry.is_dir()]) == 3


@pytest.mark.slow
def test_mock_data_trains_a_model_from_random_weights(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    model = ["--num-layers", 2, "--hidden-size", 32, "--num-attention-heads", 4, "--max-position-embeddings", 64]
    words = [*model, "--tokenizer-model", inputs / "model", "--mock-data", "--train-iters", 8, "--lr", 1e-2]
    words += ["--global-batch-size", 8, "--no-bf16", *ROUNDS, "--eval-iters", 1]  # half of it at a time
    saved = [*words, "--save-hf", tmp_path / "out"]
    [value] = ranks(1).run(run_method_words, method="pretrain", words=[str(word) for word in saved])
    losses = column(value, "loss")
    assert losses[-1] < losses[0] - 0.5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 334
    thirds = "> --mock-data: counting numbers, in thirds for training, validation and test whatever --split says"
    assert {thirds, "> 64 samples of 64 tokens to train on"} <= {*value["said"]}
    published = [*map(str, words), "--split", "99,0,1", "--sequence-parallel"]
    [other] = ranks(1).run(run_method_words, method="pretrain", words=published)
    assert other["steps"] == value["steps"]
    off = "> --sequence-parallel is off: without tensor parallelism there is nothing to split"
    assert {*other["said"]} - {*value["said"]} >= {off}


@pytest.mark.slow
def test_the_command_trains_under_torchrun_and_its_run_becomes_a_model_folder(inputs: Path, tmp_path: Path) -> None:
    """Outside of a pool of ranks: nothing is started when the samples are built."""
    words = words_for(inputs, "--train-iters", 4, "--lr-warmup-iters", 0, "--save", tmp_path / "run")
    code = run_cli(words, ranks=2, log=tmp_path / "log", method="pretrain")
    assert code == 0, (tmp_path / "log").read_text()[-4000:]
    assert [line["iteration"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    export = words_for(inputs, "--train-iters", 0, "--load", tmp_path / "run", "--save-hf", tmp_path / "out")
    code = run_cli(export, log=tmp_path / "log", method="pretrain")
    assert code == 0, (tmp_path / "log").read_text()[-4000:]
    before, after = (load_file(folder / "model.safetensors") for folder in (inputs / "model", tmp_path / "out"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
