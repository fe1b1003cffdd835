"""The comparison of a step with peers: all do the same work, and the table says what was measured."""

from pathlib import Path

import peers as bench
import pytest
from bill import write_data

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
    together = [set(names) for names in bench.SETS.values()]
    for names in bench.SETS.values():
        assert names[0] == "half", "it writes the batches"
        assert set(names) <= bench.TRAINERS.keys()
    assert set().union(*together) == bench.TRAINERS.keys()
    for one, other, limits in bench.TARGETS:
        assert any({one, other} <= names and one in ("half", "full") for names in together)
        assert limits.keys() == bench.WORKS.keys()


def test_a_table_has_each_ratio_with_its_quartiles_and_target() -> None:
    figures = dict.fromkeys(("step (ms)", "processor (ms)", "wire (MB per rank)", "page faults", "peak (MB)"), 1234.0)
    figures["peak resident (MB)"] = 2000.0
    ratio = bench.spread([0.5, 0.4, 0.6, 0.7])
    assert ratio == {"median": 0.55, "quartiles": [0.475, 0.625], "rounds": 4}
    one = {"trainers": {"half": figures}, "ratios": {"half / DDP, the same frozen": ratio, "half / full": ratio}}
    lines = bench.render({"works": {"128": {"a set": one}}}).splitlines()
    assert lines[2:4] == [
        "| half / DDP, the same frozen | 0.55 (0.47 to 0.62, target 0.88) |",
        "| half / full | 0.55 (0.47 to 0.62) |",
    ]
    assert lines[-1] == "| half | 1,234 | 1,234 | 1,234 | 1,234 | 2,000 |"


@pytest.mark.slow(reason="ten processes import torch and transformers")
def test_peers_take_the_same_steps_of_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MODEL", {**bench.MODEL, **SMALL, "num_key_value_heads": 4})
    write_data(tmp_path)
    bench.write_model(tmp_path)
    work = bench.Work(sequence=64, micro_batches=2)
    found = bench.measure_set(NAMES, tmp_path, work, 2, "cpu", REPOSITORY)
    losses = found["first losses"]
    assert max(losses.values()) - min(losses.values()) < 1e-5 * losses["half"]
    assert found["ratios"].keys() == {
        *(f"half / {name}" for name in NAMES[1:]),
        *(f"{NAMES[1]} / {name}" for name in NAMES if name != NAMES[1]),
    }
    half, frozen = found["trainers"]["half"], found["trainers"]["DDP, the same frozen"]
    # The same gradients are summed and the same weights known, of the same size: 4 bytes each, whatever the way.
    assert half["wire (MB per rank)"] == pytest.approx(frozen["wire (MB per rank)"], rel=0.2)
    assert half["phases (ms)"]["backward"] > 0
