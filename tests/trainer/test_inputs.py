"""Ranks that read different inputs are found before any of them waits for another, and named."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.errors import UserError
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for


def run_each_its_own(words: list[list[str]], folders: list[str]) -> str:
    """The sentence that stops rank r's run of ``words[r]`` in ``folders[r]``, as if each rank had a disk of its own."""
    rank, before = int(os.environ["RANK"]), os.getcwd()
    os.chdir(folders[rank])
    try:
        run_sft_words(words[rank])
    except UserError as error:
        return str(error)
    finally:
        os.chdir(before)
    return ""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def one_sentence(ranks: RankPools, words: list[list[str]], folders: list[Path]) -> str:
    sentences = ranks(2).run(run_each_its_own, words=words, folders=[str(folder) for folder in folders])
    assert sentences[0] == sentences[1]
    return str(sentences[0])


def test_a_rank_with_a_tampered_seed_is_named_with_both_seeds(ranks: RankPools, inputs: Path) -> None:
    words = [words_for(inputs, "--hft-seed", seed) for seed in (5, 6)]
    sentence = one_sentence(ranks, words, [inputs, inputs])
    assert sentence.startswith("rank 1 on ")
    assert "(TP 0, PP 0, DP 1) found other inputs than rank 0: --hft-seed is 6 instead of 5;" in sentence


def test_a_rank_with_a_tampered_plan_file_is_named_with_the_unit(
    ranks: RankPools, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hft_megatron.cli import main

    folders = [tmp_path / "rank0", tmp_path / "rank1"]
    for folder in folders:
        folder.mkdir()
        assert main(["plan", "--load-hf", str(inputs / "model"), "--save", str(folder / "plan.json")]) == 0
    capsys.readouterr()
    tampered: dict[str, Any] = json.loads((folders[1] / "plan.json").read_text())
    unit = next(row for row in tampered["units"] if row["name"].endswith("layers.2.mlp.up_proj"))
    unit["trains"] = not unit["trains"]
    (folders[1] / "plan.json").write_text(json.dumps(tampered))
    sentence = one_sentence(ranks, [words_for(inputs, "--hft-plan", "plan.json")] * 2, folders)
    assert "rank 1 on " in sentence
    assert "the plan of round 0 in plan.json differs first in model.layers.2.mlp.up_proj;" in sentence


def test_a_rank_with_other_data_is_named(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "rank0", tmp_path / "rank1"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        lines = (inputs / "data.jsonl").read_text().splitlines(keepends=True)
        (folder / "data.jsonl").write_text("".join(lines[number:]))
    sentence = one_sentence(ranks, [words_for(inputs, "--train-data-path", "data.jsonl")] * 2, folders)
    assert "rank 1 on " in sentence
    assert "the training data is data.jsonl (digest" in sentence


def test_a_rank_with_other_validation_data_is_named_by_the_source(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "rank0", tmp_path / "rank1"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "valid.yaml").write_text(
            f"- {{name: chats, path: {inputs}/data.jsonl, train_on_eos: {number == 0}}}\n"
        )
    sentence = one_sentence(ranks, [words_for(inputs, "--valid-data-path", "valid.yaml")] * 2, folders)
    assert "rank 1 on " in sentence
    assert re.search(r"the validation data is chats \(digest \w{12}\) instead of chats \(digest \w{12}\);", sentence)


def test_a_folder_without_checkpoints_is_a_mistake_where_one_is_asked_for(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    words = words_for(inputs, "--save", tmp_path, "--load", tmp_path, "--train-iters", 1, "--lr-warmup-iters", 0)
    asked = [*words, "--exit-on-missing-checkpoint"]
    sentence = one_sentence(ranks, [asked, asked], [inputs, inputs])
    assert sentence.startswith(f"--load {tmp_path} holds no checkpoint, but --exit-on-missing-checkpoint requires one")
    assert not list(tmp_path.iterdir())
    for number, options in enumerate((words, asked)):
        [found, _] = ranks(2).run(run_sft_words, words=options)
        assert len(found["steps"]) == 1 - number
