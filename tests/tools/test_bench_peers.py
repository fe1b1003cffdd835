"""The comparison of a step with peers: all do the same work, and the table says what was measured."""

import json
from math import prod
from pathlib import Path
from xml.etree import ElementTree

import peers as bench
import peers_tables as tables
import pytest
from bill import write_data
from safetensors import safe_open

from tests.support.ranks import REPOSITORY

NAMES = ("half", "DDP, the same frozen", "FSDP2, the same frozen", "DDP + ZeRO-1, full", "stock megatron-core, full")
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1024,
}


def test_every_target_and_every_set_is_of_trainers_that_there_are() -> None:
    for one in bench.SETS.values():
        assert one.trainers[0] == "half", "it writes the batches"
        assert set(one.trainers) <= bench.TRAINERS.keys()
        assert set(one.works) <= bench.WORKS.keys()
    usual = [set(one.trainers) for one in bench.SETS.values() if one.layout == tables.USUAL_LAYOUT]
    assert set().union(*usual) == bench.TRAINERS.keys()
    assert {one.layout for one in bench.SETS.values()} == {tables.USUAL_LAYOUT, *tables.OTHER_LAYOUTS}
    for ours, other, limits in tables.TARGETS:
        together = [one for one in bench.SETS.values() if {ours, other} <= set(one.trainers)]
        assert any(one.layout == tables.USUAL_LAYOUT and set(one.works) == limits.keys() for one in together)
        assert ours in ("half", "full")
        assert limits.keys() == bench.WORKS.keys()


def test_a_table_has_each_ratio_with_its_quartiles_and_target() -> None:
    figures = {**dict.fromkeys(tables.FIGURES, 1234.0), "peak resident (MB)": 2000.0}
    ratio = bench.spread([0.5, 0.4, 0.6, 0.7])
    assert ratio == {"median": 0.55, "quartiles": [0.475, 0.625], "rounds": 4}
    one = {
        "layout": "DP 2",
        "trainers": {"half": figures},
        "ratios": {"half / DDP, the same frozen": ratio, "half / full": ratio},
    }
    timed = {"half": {**figures, "phases (ms)": {"forward": 80.0, "backward": 90.0}}}
    results = {"works": {"128": {"a set": one, "another": {**one, "layout": "TP 2", "trainers": timed}}}}
    lines = tables.render(results).splitlines()
    assert lines[2:6] == [
        "| half / DDP, the same frozen | 0.55 (0.47 to 0.62, target 0.88) |",
        "| half / full | 0.55 (0.47 to 0.62) |",
        "| half / DDP, the same frozen, TP 2 | 0.55 (0.47 to 0.62) |",
        "| half / full, TP 2 | 0.55 (0.47 to 0.62) |",
    ]
    assert lines[-2:] == [
        "| half | 1,234 | 1,234 | 1,234 | 1,234 | 2,000 | - | - |",
        "| half, TP 2 | 1,234 | 1,234 | 1,234 | 1,234 | 2,000 | 80 | 90 |",
    ]
    drawn = [element.text for element in ElementTree.fromstring(tables.picture(results)) if element.text]
    assert drawn == ["128 tokens", "half", "1.00", "DDP, the same frozen", "1.82", "full", "1.82"]


def test_the_committed_picture_is_of_the_committed_result() -> None:
    results = json.loads(bench.RESULTS.read_text("utf-8"))
    assert bench.RESULTS.with_suffix(".svg").read_text("utf-8") == tables.picture(results)


@pytest.mark.slow(reason="eight processes import torch and megatron-core")
@pytest.mark.parametrize("layout", ["TP 2 + SP", "PP 2"])
def test_stock_megatron_core_takes_the_same_steps_on_other_layouts(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "MODEL", {**bench.MODEL, **SMALL, "num_key_value_heads": 4})
    write_data(tmp_path)
    bench.write_model(tmp_path)
    one = bench.Set(trainers=("half", "stock megatron-core, full"), works=(), layout=layout)
    found = bench.measure_set(one, tmp_path, bench.Work(sequence=64, micro_batches=2), 2, "cpu", REPOSITORY)
    first, second = found["first losses"].values()
    assert first == pytest.approx(second, rel=1e-5)
    assert found["trainers"]["stock megatron-core, full"]["phases (ms)"]["backward"] > 0


@pytest.mark.slow(reason="ten processes import torch and transformers")
def test_peers_take_the_same_steps_of_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MODEL", {**bench.MODEL, **SMALL, "num_key_value_heads": 4})
    write_data(tmp_path)
    bench.write_model(tmp_path)
    work = bench.Work(sequence=64, micro_batches=2)
    found = bench.measure_set(bench.Set(trainers=NAMES, works=()), tmp_path, work, 2, "cpu", REPOSITORY)
    losses = found["first losses"]
    assert max(losses.values()) - min(losses.values()) < 1e-5 * losses["half"]
    assert found["ratios"].keys() == {
        *(f"half / {name}" for name in NAMES[1:]),
        *(f"{NAMES[1]} / {name}" for name in NAMES if name != NAMES[1]),
    }
    half, frozen = found["trainers"]["half"], found["trainers"]["DDP, the same frozen"]
    # Whatever the way, a rank sends 4 bytes for each weight that trains: half for its gradient, half for the weight.
    # The kernel counts what other processes of the machine send as well, so that nothing bounds it from above.
    trains = set(json.loads((tmp_path / "trains.json").read_text()))
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as model:
        trained = sum(prod(model.get_slice(f"{name}.weight").get_shape()) for name in trains)
    assert min(half["wire (MB per rank)"], frozen["wire (MB per rank)"]) > 3.9e-6 * trained
    assert half["phases (ms)"]["backward"] > 0
