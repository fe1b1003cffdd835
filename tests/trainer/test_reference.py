"""The three kinds of reference model are one and the same, from the first step on, over rounds, stops and starts.

Run: pytest tests/trainer/test_reference.py
"""

import math
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.support.models import LAYOUTS, flags
from tests.support.preferences import words_for_pairs, write_pairs
from tests.support.ranks import RankPools, RanksFailed
from tests.support.runs import read_metrics, run_method_words
from tests.support.tiers import quick

OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "3000"]
KINDS = ("precompute", "shared", "model")


def tune(ranks: RankPools, world_size: int, words: list[str]) -> list[dict[str, Any]]:
    return ranks(world_size).run(run_method_words, method="dpo", words=words)


def losses(values: list[dict[str, Any]]) -> list[float]:
    return [step["loss"] for step in values[-1]["steps"]]


CASES: dict[str, tuple[int, list[str]]] = {
    "dp2 overlap": (2, OVERLAP),
    "packed dp2": (2, ["--packing"]),
    "packed pp2": (2, [*flags(LAYOUTS["pp2"]), "--packing"]),
    "tp2 pp2": (4, flags(LAYOUTS["tp2_pp2"])),
    "bf16": (2, ["--bf16", *OVERLAP]),
}


@pytest.mark.parametrize("case", quick(CASES, ["dp2 overlap"], reason="three whole runs"))
def test_the_three_references_give_one_loss_which_is_ln_2_at_the_first_step(
    ranks: RankPools, pairs_folder: Path, tmp_path: Path, case: str
) -> None:
    world_size, layout = CASES[case]
    options = [*layout, "--train-iters", "8", "--hft-round-interval", "3"]
    precomputed, shared, model = (
        tune(ranks, world_size, words_for_pairs(pairs_folder, *options, kind=kind, cache=tmp_path)) for kind in KINDS
    )
    first = shared[-1]["steps"][0]["measured"]
    # The rewards are exact; the loss is their softplus in fp64, and comes through a sum in the weights' dtype.
    assert [first[f"rewards/{half}"] for half in ("chosen", "rejected", "margins")] == [0.0, 0.0, 0.0]
    assert first["preference loss"] == pytest.approx(math.log(2), abs=1e-15)
    assert losses(shared) == losses(model)
    # An epoch has 24 pairs: in the first 6 steps the shapes were those of the pass before training.
    packed = "--packing" in layout
    same = 1 if packed else 6
    assert losses(precomputed)[:same] == losses(shared)[:same]
    tolerance = 1e-2 if case == "bf16" else 1e-5
    assert losses(precomputed) == pytest.approx(losses(shared), rel=tolerance)
    assert len({step["grad_norm"] for step in shared[-1]["steps"]}) == 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_tuning_of_another_runs_weights_compares_with_them_also_after_a_stop(
    ranks: RankPools, pairs_folder: Path, tmp_path: Path, kind: str
) -> None:
    words = words_for_pairs(pairs_folder, "--train-iters", 4, kind=kind, cache=tmp_path / "cache")
    tune(ranks, 1, [*words, "--save", str(tmp_path / "first")])
    words += ["--load", str(tmp_path / "first"), "--finetune"]
    whole = tune(ranks, 1, [*words, "--save", str(tmp_path / "whole")])
    saved = [*words, "--save", str(tmp_path / "second")]
    begun = tune(ranks, 1, [*saved, "--train-iters", "2"])
    if kind == "precompute":
        shutil.rmtree(tmp_path / "cache")
    gone_on = tune(ranks, 1, saved)
    assert whole[0]["steps"][0]["measured"]["rewards/margins"] == 0.0
    assert begun[0]["steps"] + gone_on[0]["steps"] == whole[0]["steps"]


@pytest.mark.slow
def test_validation_between_overlapped_gathers_is_the_same_with_every_reference(
    ranks: RankPools, pairs_folder: Path, tmp_path: Path
) -> None:
    valid = write_pairs(tmp_path / "valid.jsonl", 7, first=50)
    options = [*OVERLAP, "--train-iters", 4, "--valid-data-path", valid, "--eval-interval", 2]
    found = []
    for kind in KINDS:
        save = tmp_path / kind
        tune(ranks, 2, words_for_pairs(pairs_folder, *options, "--save", save, kind=kind, cache=tmp_path / "cache"))
        records = read_metrics(save)
        found.append([record["preference loss"] for record in records if "preference loss" in record])
        found[-1] += [record[name] for record in records for name in record if name == "preference loss validation"]
        assert len(found[-1]) == 6
    precomputed, shared, model = found
    assert shared == model
    assert precomputed == pytest.approx(shared, rel=1e-5)


@pytest.mark.slow
def test_a_tuning_resumes_with_another_kind_of_reference_and_in_another_folder(
    ranks: RankPools, pairs_folder: Path, tmp_path: Path
) -> None:
    def words(kind: str, load: str, save: str, iterations: int) -> list[str]:
        folders = ["--load", tmp_path / load, "--save", tmp_path / save]
        rounds = ["--hft-first-round", 1, "--hft-rotation", "complementary"]
        options = ["--train-iters", iterations, *rounds, *folders]
        return words_for_pairs(pairs_folder, *options, kind=kind, cache=tmp_path / "cache")

    tune(ranks, 1, words_for_pairs(pairs_folder, "--train-iters", 2, "--save", tmp_path / "base", kind="shared"))
    whole = tune(ranks, 1, [*words("shared", "base", "whole", 6), "--finetune"])
    begun = tune(ranks, 1, [*words("precompute", "base", "one", 2), "--finetune"])
    shared = tune(ranks, 1, words("shared", "one", "two", 4))
    copies = [read_metrics(tmp_path / run)[-1]["reference bytes"] for run in ("whole", "two")]
    assert copies[0] == copies[1], "a copy of what another run has trained would be wasted"
    # With its log-probabilities in the cache, nothing of the base is needed any more.
    shutil.move(tmp_path / "base", tmp_path / "moved")
    (tmp_path / "base").mkdir()
    ended = tune(ranks, 1, words("precompute", "two", "two", 6))
    steps = losses(begun) + losses(shared) + losses(ended)
    assert steps == pytest.approx(losses(whole), rel=1e-5)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(RanksFailed, match=r"UserError: --load .*two: .*base.*started from .* cannot be read .*; put"):
        tune(ranks, 1, words("precompute", "two", "two", 7))


def test_a_cache_that_can_not_be_written_is_found_before_the_pass_over_the_data(
    ranks: RankPools, pairs_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    words = words_for_pairs(pairs_folder, cache=tmp_path / "file" / "cache")
    with pytest.raises(RanksFailed, match=r"--dpo-reference-cache .*file/cache cannot be written") as failed:
        tune(ranks, 2, words)
    assert "reference log-probabilities" not in str(failed.value)


@pytest.mark.slow
def test_log_probabilities_are_kept_and_made_again_where_the_file_is_torn(
    ranks: RankPools, pairs_folder: Path, tmp_path: Path
) -> None:
    words = words_for_pairs(pairs_folder, "--train-iters", 2, cache=tmp_path)
    first = tune(ranks, 1, words)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    assert not any(f"from {file}" in line for line in first[0]["said"])
    assert any(f"from {file}" in line for line in tune(ranks, 1, words)[0]["said"])
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    for damaged, sentence in ((whole[: len(whole) // 2], "cannot be read"), (flipped, "is damaged")):
        file.write_bytes(damaged)
        again = tune(ranks, 1, words)
        assert any(str(file) in line and sentence in line for line in again[0]["said"])
        assert file.read_bytes() == whole
        assert losses(again) == losses(first)


def run_in_parts(words: list[str], end_at: int | None = None) -> dict[str, Any]:
    """For a rank: the passes before training keep what they have five times, and batch ``end_at`` of them fails."""
    from hft_megatron.methods.dpo import reference

    original, batches = reference.reference_pass, 0

    def counted(*arguments: Any) -> Any:
        nonlocal batches
        batches += 1
        assert batches != end_at, "the pass ends here"
        return original(*arguments)

    with patch.object(reference, "reference_pass", counted), patch.object(reference, "_PARTS", 5):
        return {**run_method_words("dpo", words), "batches": batches}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dp2 overlap", "bf16", "packed dp2", "packed pp2"])
def test_a_pass_that_was_stopped_resumes_where_it_was(
    ranks: RankPools, pairs_folder: Path, tmp_path: Path, case: str
) -> None:
    """Ranks hold different numbers of pairs: packed, and in the last batch of validation, where one of two has none."""
    world_size, layout = CASES[case]
    valid = write_pairs(tmp_path / "valid.jsonl", 5, first=50)
    options = [*layout, "--train-iters", "3", "--valid-data-path", str(valid), "--eval-interval", "3"]
    cache, undisturbed = tmp_path / "cache", tmp_path / "undisturbed"
    words = words_for_pairs(pairs_folder, *options, cache=cache)
    whole = ranks(world_size).run(run_in_parts, words=words_for_pairs(pairs_folder, *options, cache=undisturbed))
    with pytest.raises(RanksFailed, match="the pass ends here"):
        ranks(world_size).run(run_in_parts, words=words, end_at=3)
    [part] = cache.iterdir()
    again = ranks(world_size).run(run_in_parts, words=words)
    lines, left = (
        [line for line in values[0]["said"] if "reference log-probabilities:" in line] for values in (whole, again)
    )
    assert 0 < len(left) < len(lines)
    assert left == lines[-len(left) :]
    assert again[0]["batches"] == whole[0]["batches"] - 2, "what was there is not asked for again"
    assert left[-1].endswith(" 5 of 5 pairs")
    assert any(line.endswith(f" pairs from {part}") for line in again[0]["said"])
    assert losses(again) == losses(whole)
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == {
        file.name: file.read_bytes() for file in undisturbed.iterdir()
    }


def test_log_probabilities_of_other_pairs_are_never_taken(ranks: RankPools, pairs_folder: Path, tmp_path: Path) -> None:
    others = write_pairs(tmp_path / "others.jsonl", 24, first=7)
    words = words_for_pairs(pairs_folder, "--train-iters", 1, cache=tmp_path / "cache")
    tune(ranks, 1, words)
    [mine] = (tmp_path / "cache").iterdir()
    tune(ranks, 1, [*words, "--train-data-path", str(others)])
    [theirs] = set((tmp_path / "cache").iterdir()) - {mine}
    shutil.copy(theirs, mine)
    with pytest.raises(RanksFailed, match=r"UserError: --dpo-reference-cache .* was made for the data"):
        tune(ranks, 1, words)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "files"), [("--bf16", 2), ("--no-bf16", 1)])
def test_log_probabilities_of_another_layout_are_taken_where_that_is_rounding_only(
    ranks: RankPools, pairs_folder: Path, tmp_path: Path, dtype: str, files: int
) -> None:
    cache = tmp_path / "cache"
    words = words_for_pairs(pairs_folder, "--train-iters", 1, dtype, cache=cache)
    tune(ranks, 2, [*words, "--tensor-model-parallel-size", "2"])
    first = losses(tune(ranks, 1, words))[0]
    assert abs(first - math.log(2)) < 1e-6
    assert len(list(cache.iterdir())) == files


@pytest.mark.slow
def test_a_reference_of_its_own_is_compared_with_from_the_first_step(
    ranks: RankPools, pairs_folder: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "trained"
    words = words_for_pairs(pairs_folder, "--train-iters", 2, cache=tmp_path / "cache")
    tune(ranks, 1, [*words, "--save-hf", str(trained)])
    folder = ["--dpo-reference-model", str(trained)]
    precomputed = tune(ranks, 1, [*words, *folder])
    model = tune(ranks, 1, words_for_pairs(pairs_folder, "--train-iters", 2, *folder, kind="model"))
    assert losses(precomputed) == losses(model)
    assert abs(losses(model)[0] - math.log(2)) > 1e-3
