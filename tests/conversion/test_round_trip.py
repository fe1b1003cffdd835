"""Hugging Face -> our ranks -> Hugging Face keeps every bit. Run: pytest tests/conversion/test_round_trip.py"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.models import LAYOUTS, VARIANTS, build_from_folder, make_llama, make_llama1
from tests.support.ranks import RankPools
from tests.support.tiers import quick

WORLD_SIZE = {"tp1": 1, "tp2": 2, "pp2": 2, "pp2_vpp": 2, "dp2": 2, "tp2_pp2": 4}


def run_round_trip(
    source: str,
    output: str,
    layout: str,
    dtype: str,
    save_dtype: str | None = None,
    trained: tuple[str, ...] = (),
    scale: float = 1.0,
    shard_bytes: int = 5_000_000_000,
    vocab_multiple: int = 1,
    from_another_run: tuple[str, ...] = (),
) -> list[str]:
    """Loads ``source`` at ``layout`` in ``dtype``, multiplies units by ``scale``, writes ``output``.

    Multiplied are those that the run ``trained``, and frozen ones that it took ``from_another_run``.
    """
    from hft_megatron.conversion import save
    from hft_megatron.model.parameters import parameter_slots

    chunks, shape, placement = build_from_folder(source, LAYOUTS[layout], getattr(torch, dtype))
    for slot in parameter_slots(chunks):
        if slot.unit in (*trained, *from_another_run):
            slot.parameter.data.mul_(scale)
    Path(output).mkdir(exist_ok=True)
    rules = save.ExportRules(
        source=source,
        trained=frozenset(trained),
        save_dtype=None if save_dtype is None else getattr(torch, save_dtype),
    )
    said: list[str] = []
    wholes = save.gathered_weights(chunks, shape, placement)
    if placement.rank == 0:
        run_dtype = getattr(torch, dtype)
        save.write_weights(Path(output), wholes, shape, run_dtype, rules, said.append, max_shard_bytes=shard_bytes)
    assert list(wholes) == []
    return said


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Without the rotary frequencies of old exports, which are no weights."""
    return {name: tensor for name, tensor in tensors(folder).items() if not name.endswith("inv_freq")}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    made = {variant: make_llama(folder / variant, variant) for variant in VARIANTS}
    made["odd_vocab_tied"] = make_llama(folder / "odd_vocab_tied", "odd_vocab", tie_word_embeddings=True)
    made["bfloat16"] = make_llama(folder / "bfloat16", "gqa", torch.bfloat16)
    made["float16"] = make_llama(folder / "float16", "odd_vocab", torch.float16)
    made["llama1"] = make_llama1(folder / "llama1")
    return made


@pytest.mark.parametrize("layout", quick(WORLD_SIZE, ["pp2_vpp"]))
def test_every_bit_comes_back_at_every_layout(
    layout: str, ranks: RankPools, sources: dict[str, Path], tmp_path: Path
) -> None:
    pool = ranks(WORLD_SIZE[layout])
    for name, source in sources.items():
        # bf16 cannot hold what is in an fp16 file.
        dtype = "bfloat16" if name in ("bfloat16", "float16", "llama1") else "float32"
        pool.run(run_round_trip, source=str(source), output=str(tmp_path / name), layout=layout, dtype=dtype)
        assert_same_bits(tensors(tmp_path / name), weights_of(source))


def test_an_fp32_run_holds_fp16_and_bf16_files_and_copies_nothing(
    ranks: RankPools, sources: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("float16", "bfloat16"):
        [said] = ranks(1).run(
            run_round_trip, source=str(sources[name]), output=str(tmp_path / name), layout="tp1", dtype="float32"
        )
        assert said == []
        assert_same_bits(tensors(tmp_path / name), tensors(sources[name]))


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
@pytest.mark.parametrize("source_dtype", ["float16", "float32"])
def test_a_source_that_bf16_cannot_hold_keeps_its_frozen_tensors_and_its_dtype(
    source_dtype: str, layout: str, ranks: RankPools, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources["float16" if source_dtype == "float16" else "odd_vocab"]
    trained = ("model.layers.1.self_attn.q_proj", "model.layers.3.mlp.down_proj", "model.embed_tokens")
    options = {"source": str(source), "output": str(tmp_path), "layout": layout, "dtype": "bfloat16"}
    said = ranks(2).run(run_round_trip, **options, trained=trained, scale=2.0)[0]
    found, expected = tensors(tmp_path), tensors(source)
    for unit in trained:
        name = f"{unit}.weight"
        expected[name] = (expected[name].bfloat16() * 2).to(getattr(torch, source_dtype))
    assert_same_bits(found, expected)
    assert len(said) == 1
    assert f"{len(expected) - 3} frozen tensors are copied from {source}" in said[0]
    assert f"trained ones are written as {source_dtype}" in said[0].replace("torch.", "")


def test_what_rested_on_another_runs_weights_is_not_replaced_by_the_sources(
    ranks: RankPools, sources: dict[str, Path], tmp_path: Path
) -> None:
    source, unit = sources["float16"], "model.layers.1.self_attn.q_proj"
    options = {"source": str(source), "output": str(tmp_path), "layout": "tp1", "dtype": "bfloat16", "scale": 2.0}
    [[said]] = ranks(1).run(run_round_trip, **options, from_another_run=(unit,))
    expected = tensors(source)
    expected[f"{unit}.weight"] = (expected[f"{unit}.weight"].bfloat16() * 2).half()
    assert_same_bits(tensors(tmp_path), expected)
    assert f"{len(expected) - 1} frozen tensors are copied" in said


@pytest.mark.parametrize("save_dtype", ["bfloat16", "float16", "float32"])
def test_save_dtype_rules_over_every_tensor(
    save_dtype: str, ranks: RankPools, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources["bfloat16"]
    ranks(1).run(
        run_round_trip,
        source=str(source),
        output=str(tmp_path),
        layout="tp1",
        dtype="bfloat16",
        save_dtype=save_dtype,
        trained=("lm_head",),
        scale=0.5,
    )
    wanted = getattr(torch, save_dtype)
    expected = {name: tensor.to(wanted) for name, tensor in tensors(source).items()}
    expected["lm_head.weight"] = expected["lm_head.weight"] * 0.5
    assert_same_bits(tensors(tmp_path), expected)


def shard(source: Path, target: Path) -> Path:
    """The same model in three files and an index."""
    weights = load_file(source / "model.safetensors")
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    weight_map: dict[str, str] = {}
    for part in range(3):
        names = sorted(weights)[part::3]
        file = f"model-{part + 1:05d}-of-00003.safetensors"
        save_file({name: weights[name] for name in names}, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


@pytest.mark.parametrize("layout", ["tp1", "tp2", "tp2_pp2"])
def test_sharded_files_are_read_and_written(
    layout: str, ranks: RankPools, sources: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    source = shard(sources["gqa"], tmp_path / "sharded")
    target = tmp_path / "out"
    ranks(WORLD_SIZE[layout]).run(
        run_round_trip, source=str(source), output=str(target), layout=layout, dtype="float32", shard_bytes=100_000
    )
    expected = tensors(sources["gqa"])
    assert_same_bits(tensors(target), expected)
    index: dict[str, Any] = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    for name, file in index["weight_map"].items():
        with safe_open(target / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 (not a dictionary)
    assert all(sum(t.nbytes for t in load_file(target / file).values()) <= 100_000 for file in files)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    loaded = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32).state_dict()
    assert_same_bits({name: loaded[name] for name in expected}, expected)
