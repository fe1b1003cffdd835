"""Validation beside the rows of the run matrix: sources and their own options, before the first step, and without one.

Run: pytest tests/trainer/test_validation.py
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.names import MethodName
from hft_megatron.data.templates import BUILT_IN
from tests.support.models import LAYOUTS, flags
from tests.support.preferences import words_for_pairs, write_pairs
from tests.support.ranks import RankPools
from tests.support.runs import make_inputs, read_metrics, run_method_words, words_for, write_data
from tests.support.tiers import quick

NOTHING = ("--train-iters", "0")
GENERAL = "- {name: general, path: text.txt, train_on_eos: false}\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``make_inputs``, with the validation data ``chats.jsonl`` and ``text.txt``."""
    folder = make_inputs(tmp_path_factory.mktemp("validation"))
    write_data(folder / "chats.jsonl", 5)
    (folder / "text.txt").write_text("".join(f"{'The bridge is closed. ' * (1 + i % 3)}\n" for i in range(7)))
    (folder / "general.yaml").write_text(GENERAL)
    return folder


def validated(
    ranks: RankPools, world_size: int, words: Sequence[object], save: Path, method: MethodName = "sft"
) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that a run leaves of its validations."""
    given = [*map(str, words), "--save", str(save)]
    ranks(world_size).run(run_method_words, method=method, words=given)
    return [line for line in read_metrics(save) if "consumed samples" not in line]


LAYOUT: dict[str, tuple[int, list[str]]] = {
    "packed dp2": (2, ["--packing", "--micro-batch-size", "2"]),
    "pp2": (2, flags(LAYOUTS["pp2"])),
    "tp2_sp": (2, flags(LAYOUTS["tp2_sp"])),
    "pp2_vpp": (2, flags(LAYOUTS["pp2_vpp"])),
    "bf16": (1, ["--bf16"]),
}
KIND = {"packed dp2": "precompute", "pp2": "shared", "tp2_sp": "model", "pp2_vpp": "shared", "bf16": "precompute"}
"""Of the reference that pairs are compared with."""


@pytest.mark.parametrize("layout", quick(LAYOUT, ["packed dp2"]))
@pytest.mark.parametrize("method", ["sft", pytest.param("dpo", marks=pytest.mark.slow(reason="four runs"))])
def test_a_source_among_others_has_to_the_last_bit_the_values_that_it_has_alone(
    method: MethodName, layout: str, ranks: RankPools, inputs: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    sources = {"general": inputs / "general.yaml", "chats": inputs / "chats.jsonl"}
    world_size, words = LAYOUT[layout]
    base = words_for(inputs, *NOTHING)
    if method == "dpo":  # of weights that are not the reference's
        base = words_for_pairs(pairs_folder, *words, "--load", tmp_path / "run", kind=KIND[layout], cache=tmp_path)
        tuned = [*base, "--train-iters", "3", "--save", str(tmp_path / "run")]
        ranks(world_size).run(run_method_words, method=method, words=tuned)
        base += NOTHING
        sources = {name: write_pairs(tmp_path / f"{name}.jsonl", 5 + i, first=40 * i) for i, name in enumerate("ab")}

    def values(*chosen: Path) -> dict[str, float]:
        options = [*base, *words, "--valid-data-path", *chosen]
        [line] = validated(ranks, world_size, options, tmp_path / "-".join(path.stem for path in chosen), method)
        assert line.pop("iteration") == (0 if method == "sft" else 3)
        return line

    every = values(*sources.values())
    together = {name: value for name, value in every.items() if name.endswith(" validation")}
    for source, path in sources.items():
        alone = values(path)
        assert {name: every[f"{name}/{source}"] for name in alone} == alone
        assert alone.keys() == together.keys()
    assert len(every) == 3 * len(together)
    name = "lm loss validation" if method == "sft" else "preference loss validation"
    low, high = sorted(every[f"{name}/{source}"] for source in sources)
    assert low < every[name] < high


@pytest.mark.slow
def test_sources_of_one_file_are_read_by_their_own_options_also_out_of_the_cache(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(BUILT_IN["chatml"])
    own = {"plain": "", "open": "train_on_eos: no", "all": "loss_on: all", "chat": "chat_template: t.jinja"}
    entries = [f"- {{name: {name}, path: {inputs}/chats.jsonl, {option}}}\n" for name, option in own.items()]
    (tmp_path / "valid.yaml").write_text("".join(entries))
    base = words_for(inputs, *NOTHING, "--data-cache-path", tmp_path / "cache", "--valid-data-path")
    [line] = validated(ranks, 1, [*base, tmp_path / "valid.yaml"], tmp_path / "listed")
    found = {name: line[f"lm loss validation/{name}"] for name in own}
    assert len({*found.values()}) == 4
    options = {"open": ["--no-train-on-eos"], "all": ["--loss-on", "all"], "chat": ["--chat-template", "chatml"]}
    for name, words in options.items():
        alone = [*base, inputs / "chats.jsonl", *words, "--data-cache-path", tmp_path / "other"]
        [line] = validated(ranks, 1, alone, tmp_path / name)
        assert line["lm loss validation"] == found[name]


def test_eval_iters_takes_as_many_batches_of_every_source(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    few = write_data(tmp_path / "few.jsonl", 4)
    base = words_for(inputs, *NOTHING, "--eval-iters", 1, "--eval-interval", 3, "--valid-data-path")
    [cut] = validated(ranks, 1, [*base, inputs / "chats.jsonl", inputs / "general.yaml"], tmp_path / "cut")
    [whole] = validated(ranks, 1, [*base, few], tmp_path / "whole")
    assert cut["lm loss validation/chats"] == whole["lm loss validation"]
    assert cut["lm loss validation/general"] > 0


@pytest.mark.slow(reason="six commands")
def test_weights_that_nothing_trains_are_validated_wherever_they_are_from(
    ranks: RankPools, inputs: Path, tmp_path: Path
) -> None:
    """At the start of a run, at its end, and by commands of their own, which change nothing in its folder."""
    run, valid = tmp_path / "run", ["--valid-data-path", inputs / "chats.jsonl", inputs / "general.yaml"]
    trained = words_for(inputs, *valid, "--train-iters", 4, "--load", run)
    start, end = validated(ranks, 2, [*trained, "--eval-on-start"], run)
    assert [start["iteration"], end["iteration"]] == [0, 4]
    assert end["lm loss validation"] < start["lm loss validation"]
    without = [line for line in read_metrics(run) if "consumed samples" in line]
    words = [*trained, "--eval-on-start", "--train-iters", 6]
    again = validated(ranks, 2, words, run)
    assert again[:2] == [start, end]
    assert [line["iteration"] for line in again] == [0, 4, 6], "a run that is resumed is not at its start"
    assert [line for line in read_metrics(run) if "consumed samples" in line][:4] == without

    apart = words_for(inputs, *NOTHING, *valid)
    assert validated(ranks, 2, apart, tmp_path / "base") == [start]
    lines, files = read_metrics(run), sorted(path.name for path in run.iterdir())
    saved = [*apart, "--load", run, "--save-hf", tmp_path / "out"]
    assert validated(ranks, 2, saved, run)[3:] == [again[-1]]
    assert read_metrics(run)[:-1] == lines
    assert sorted(path.name for path in run.iterdir()) == files
    weights = [*apart, "--load", run, "--finetune"]
    [finetuned] = validated(ranks, 2, weights, tmp_path / "finetuned")
    assert finetuned == {**again[-1], "iteration": 0}
    exported = words_for(inputs, *NOTHING, *valid, "--load-hf", tmp_path / "out")
    assert validated(ranks, 2, exported, tmp_path / "exported") == [finetuned]


@pytest.mark.slow
def test_a_run_that_begins_again_notes_its_start_once(ranks: RankPools, inputs: Path, tmp_path: Path) -> None:
    words = words_for(inputs, "--train-iters", 3, "--eval-on-start", "--valid-data-path", inputs / "chats.jsonl")
    ranks(1).run(run_method_words, method="sft", words=[*words, "--save", str(tmp_path / "other")])
    (tmp_path / "run").mkdir()
    lines = (tmp_path / "other" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "metrics.jsonl").write_text(lines)
    assert [line["iteration"] for line in validated(ranks, 1, words, tmp_path / "run")] == [0, 3]


def test_without_training_data_nothing_else_is_needed_to_validate(ranks: RankPools, inputs: Path) -> None:
    words = ["--load-hf", inputs / "model", *NOTHING, "--no-bf16", "--valid-data-path", inputs / "chats.jsonl"]
    [value] = ranks(1).run(run_method_words, method="sft", words=[str(word) for word in words])
    assert not any("data.jsonl" in line for line in value["said"])
    assert any("chats.jsonl (messages): 5 examples" in line for line in value["said"])
