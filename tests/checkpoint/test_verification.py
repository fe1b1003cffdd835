"""A damaged checkpoint is named, never loaded, and passed over only when asked. Run: pytest tests/checkpoint"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.checkpoint.folders import find_checkpoints
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, run_sft_words, words_for

TP2 = ["--tensor-model-parallel-size", "2"]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def garble(file: Path) -> None:
    file.write_text(file.read_text().replace('"sha256"', '"sha255"'))


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a flipped bit in a shard": ("__1_0.distcp", flip_a_bit, "is not as it was saved (sha256"),
    "a shard cut short": ("__0_0.distcp", cut, "were saved"),
    "a missing shard": ("__1_0.distcp", Path.unlink, "is missing"),
    "a flipped bit in the index": (".metadata", flip_a_bit, "is not as it was saved (sha256"),
    "a flipped bit in the position": ("train_state.json", flip_a_bit, "is not as it was saved (sha256"),
    "a position cut short": ("train_state.json", cut, "were saved"),
    "a missing position": ("train_state.json", Path.unlink, "is missing"),
    "an unreadable file": ("common.pt", lambda file: (file.unlink(), file.symlink_to(file)), "cannot be read ("),
    "digests without their names": ("digests.json", garble, "cannot be read (not a list of digests"),
    "a list of digests that is no JSON": ("digests.json", cut, "cannot be read"),
}
"""File, what happens to it, and what the sentence says."""


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return words_for(make_inputs(tmp_path_factory.mktemp("damage")), *TP2)


@pytest.fixture(scope="session")
def saved(ranks: RankPools, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a checkpoint of every second, to be copied."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    constant = [*words, "--lr-decay-style", "constant"]
    ranks(2).run(run_sft_words, words=[*constant, "--train-iters", "4", "--save", str(folder), "--save-interval", "2"])
    return folder


def resuming(words: list[str], run: Path) -> list[str]:
    return [*words, "--lr-decay-style", "constant", "--save", str(run), "--load", str(run), "--save-interval", "2"]


def run_refused(words: list[str]) -> str:
    """The sentence with which a rank refuses to continue, before a model is built."""
    from unittest.mock import patch

    from hft_megatron.errors import UserError
    from hft_megatron.trainer import resume

    def not_reached(*arguments: Any) -> None:
        raise AssertionError("a model was built")

    with patch.object(resume, "build_model", not_reached), pytest.raises(UserError) as caught:
        run_sft_words(words)
    return str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_an_error_that_names_the_file_and_the_newest_good_one(
    damage: str, ranks: RankPools, words: list[str], saved: Path, tmp_path: Path
) -> None:
    file, change, said = DAMAGES[damage]
    run = shutil.copytree(saved, tmp_path / "run")
    change(run / "iter_0000004" / file)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    first, second = ranks(2).run(run_refused, words=resuming(words, run))
    assert first == second, "every rank must come to the same end"
    assert f"--load {run}: {run / 'iter_0000004' / file} " in first
    assert said in first
    assert first.endswith("the newest intact checkpoint is iter_0000002: add --load-fallback to resume from it.")
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


@pytest.mark.slow
def test_with_load_fallback_the_run_resumes_from_the_newest_good_one_and_keeps_the_damaged(
    ranks: RankPools, words: list[str], saved: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    flip_a_bit(run / "iter_0000004" / "__0_0.distcp")
    whole = ranks(2).run(run_sft_words, words=[*words, "--lr-decay-style", "constant"])
    resumed = ranks(2).run(run_sft_words, words=[*resuming(words, run), "--load-fallback"])
    assert any(line.startswith("> --load-fallback: ") and "iter_0000002" in line for line in resumed[0]["said"])
    for rank in range(2):
        assert resumed[rank]["steps"] == whole[rank]["steps"][2:]
        assert resumed[rank]["state"] == whole[rank]["state"]
    assert (run / "iter_0000004.damaged" / "__0_0.distcp").exists()
    assert [path.name for path in find_checkpoints(str(run)).complete] == [f"iter_000000{i}" for i in (6, 4, 2)]
    again = ranks(2).run(run_sft_words, words=resuming(words, run))
    assert again[0]["steps"] == []


def test_a_checkpoint_that_the_tracker_names_and_that_is_gone_is_damage_too(
    ranks: RankPools, words: list[str], saved: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    shutil.rmtree(run / "iter_0000004")
    [said, _] = ranks(2).run(run_refused, words=resuming(words, run))
    assert "iter_0000004, which latest_checkpointed_iteration.txt names, does not exist" in said
    assert "the newest intact checkpoint is iter_0000002" in said


def test_a_run_folder_without_its_identity_is_refused(
    ranks: RankPools, words: list[str], saved: Path, tmp_path: Path
) -> None:
    """Nothing could be compared: other data or another plan would be used without a word."""
    run = shutil.copytree(saved, tmp_path / "run")
    (run / "run_identity.json").unlink()
    [said, _] = ranks(2).run(run_refused, words=resuming(words, run))
    assert "run_identity.json, the identity of the run, cannot be read" in said


def test_where_no_checkpoint_is_good_no_fallback_is_offered(
    ranks: RankPools, words: list[str], saved: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    for path in (run / "iter_0000002", run / "iter_0000004"):
        flip_a_bit(path / "common.pt")
    [said, _] = ranks(2).run(run_refused, words=[*resuming(words, run), "--load-fallback"])
    assert said.endswith("there is no older intact checkpoint; copy the folder again, or give another one.")
