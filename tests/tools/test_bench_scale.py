"""The tables of published models on many devices: what they say is the formulas', and they stand in docs/scale.md."""

import json

import pytest
import scale as bench

from hft_megatron.config.model_shape import ModelShape
from hft_megatron.costs.step_time import Trains
from hft_megatron.hft.units import NAMES_IN_LAYER
from tests.support.published_configs import CONFIGS


def everything(unit: str) -> bool:
    return True


def test_the_models_are_the_published_ones() -> None:
    sizes = {
        name: ModelShape.from_hf_config(keys, source=name).parameter_count() for name, keys in bench.MODELS.items()
    }
    assert {name: round(size / 1e9, 1) for name, size in sizes.items()} == {
        "Llama-2-7B": 6.7,
        "Llama-2-13B": 13.0,
        "Llama-2-70B": 69.0,
        "Llama-3-8B": 8.0,
        "Llama-3-70B": 70.6,
    }
    for name in ("Llama-2-7B", "Llama-2-70B", "Llama-3-8B"):
        assert bench.MODELS[name].items() <= CONFIGS[name].items()


def test_every_layout_that_is_looked_at_fills_the_devices_and_shares_the_batch() -> None:
    shape = ModelShape.from_hf_config(bench.MODELS["Llama-2-13B"], source="")
    found = list(bench.layouts(shape, 64))
    assert len({(one.tensor_model_parallel_size, one.pipeline_model_parallel_size) for one in found}) == len(found)
    for one in found:
        replicas = 64 // (one.tensor_model_parallel_size * one.pipeline_model_parallel_size)
        assert replicas * one.tensor_model_parallel_size * one.pipeline_model_parallel_size == 64
        assert bench.SEQUENCES % replicas == 0
        assert one.sequence_parallel == (one.tensor_model_parallel_size > 1)


def test_a_layout_has_the_least_recomputation_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ModelShape.from_hf_config(bench.MODELS["Llama-2-7B"], source="")

    def recomputation(room: float) -> str | None:
        monkeypatch.setattr(bench, "ROOM", room)
        found = {(one.tensor, one.pipeline): one for one in bench.choices(shape, 8, everything)}
        choice = found.get((1, 1))
        return None if choice is None else choice.recomputation

    first = next(bench.layouts(shape, 8))
    monkeypatch.setattr(bench, "layouts", lambda *_: [first])
    assert recomputation(10**12) == "none"
    assert recomputation(60e9) == "full"
    assert recomputation(40e9) is None


def test_a_case_says_what_fits_with_half_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = {"memory_gb": 1.0, "data": 1}
    of_half = [
        bench.Choice(tensor=1, pipeline=1, recomputation="full", step_s=9.0, **choice),
        bench.Choice(tensor=2, pipeline=1, recomputation="none", step_s=4.0, **choice),
        bench.Choice(tensor=4, pipeline=1, recomputation="none", step_s=5.0, **choice),
    ]
    of_full = [
        bench.Choice(tensor=2, pipeline=1, recomputation="selective", step_s=7.0, **choice),
        bench.Choice(tensor=4, pipeline=1, recomputation="none", step_s=6.0, **choice),
    ]

    def chosen(shape: ModelShape, world_size: int, trains: Trains) -> list[bench.Choice]:
        return of_full if all(trains(f"model.layers.0.{module}") for module in NAMES_IN_LAYER) else of_half

    monkeypatch.setattr(bench, "choices", chosen)
    case = bench.one_case("Llama-2-7B", 8)
    assert (case["half"]["words"], case["full"]["words"]) == ("TP 2 x PP 1 x DP 1", "TP 4 x PP 1 x DP 1")
    assert case["half on full's layout (s)"] == 5.0
    assert case["only half fits"] == ["TP 1 x PP 1 x DP 1, layers recomputed"]
    assert case["full recomputes more"] == ["TP 2 x PP 1 x DP 1: attention, half nothing"]
    steps, fits = bench.render({"sequences": 10, "sequence": 100, "cases": [case]}).split("\n\n")
    cells = [cell.strip() for cell in steps.splitlines()[-1].strip("|").split("|")]
    assert cells[2:] == [
        *("TP 2 x PP 1 x DP 1", "4.00", "250", "TP 4 x PP 1 x DP 1", "6.00", "167", "0.67", "0.83"),
    ]
    assert "attention, half nothing" in fits


def test_the_documentation_has_the_tables_of_the_committed_result() -> None:
    text = bench.DOCUMENT.read_text(encoding="utf-8")
    between = text.partition(bench.BEGIN)[2].partition(bench.END)[0]
    assert between.strip() == bench.render(json.loads(bench.RESULTS.read_text(encoding="utf-8")))


def test_the_committed_result_is_what_the_formulas_say_now() -> None:
    committed = json.loads(bench.RESULTS.read_text(encoding="utf-8"))
    assert committed["cases"][0] == json.loads(json.dumps(bench.one_case("Llama-2-7B", 8)))


@pytest.mark.slow(reason="five models on four numbers of devices")
def test_the_whole_committed_result_is_what_the_formulas_say_now() -> None:
    committed = json.loads(bench.RESULTS.read_text(encoding="utf-8"))
    assert committed == json.loads(json.dumps(bench.estimate(list(bench.MODELS), bench.WORLDS)))
