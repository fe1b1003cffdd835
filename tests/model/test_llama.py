"""The model gives Hugging Face's logits at every layout."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from hft_megatron.errors import UserError
from hft_megatron.model import llama
from hft_megatron.model.layers import RMSNorm
from hft_megatron.model.llama import check_implementation, layer_spec
from tests.support.models import LAYOUTS, VARIANTS, build_from_folder, forward_logits, make_llama, make_llama1
from tests.support.tiers import quick

WORLD_SIZE = {"tp1": 1, "tp2": 2, "tp2_sp": 2, "pp2": 2, "pp2_vpp": 2, "tp2_pp2": 4}


def reference_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits


def run_logits(folder: str, layout: str) -> list[float]:
    """Largest difference from the reference, for every micro-batch that this rank saw."""
    chunks, shape, _ = build_from_folder(folder, LAYOUTS[layout])
    reference = load_file(f"{folder}/reference.st")
    results = []
    for logits in forward_logits(chunks, reference["tokens"]):
        assert (logits[..., shape.vocab_size :] == float("-inf")).all()
        results.append((logits[..., : shape.vocab_size] - reference["logits"]).abs().max().item())
    return results


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for variant in (*VARIANTS, "llama1"):
        folder = tmp_path_factory.mktemp("llama") / variant
        if variant == "llama1":
            make_llama1(folder)
        else:
            make_llama(folder, variant)
        tokens = torch.randint(0, 96, (2, 48), generator=torch.Generator().manual_seed(1))
        save_file({"tokens": tokens, "logits": reference_logits(folder, tokens)}, folder / "reference.st")
        made[variant] = folder
    return made


@pytest.mark.engine
@pytest.mark.parametrize("layout", quick(WORLD_SIZE, ["tp2_pp2"]))
def test_logits_equal_transformers_for_every_variant(ranks, folders, layout):
    pool = ranks(WORLD_SIZE[layout])
    for variant, folder in folders.items():
        per_rank = pool.run(run_logits, folder=str(folder), layout=layout)
        differences = [difference for rank in per_rank for difference in rank]
        assert differences, f"{variant}: no rank saw logits"
        assert max(differences) <= 1e-4, f"{variant}: {per_rank}"


class Products(TorchDispatchMode):
    """Counts batched matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.batched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.batched += func is torch.ops.aten.bmm.default
        return func(*args, **(kwargs or {}))


def run_with_frozen_weights(folder: str) -> list[int]:
    """Batched products of a forward pass in which nothing trains, over one sequence and over two."""
    (model,), _, _ = build_from_folder(folder, {})
    model.requires_grad_(False)
    counts = []
    for sequences in (1, 2):
        tokens = torch.ones(sequences, 48, dtype=torch.int64)
        with Products() as products:
            model(tokens, torch.arange(48).expand_as(tokens), None)
        counts.append(products.batched)
    return counts


def test_a_frozen_matrix_multiplies_one_sequence_at_once_and_not_token_by_token(ranks, folders):
    assert ranks(1).run(run_with_frozen_weights, folder=str(folders["gqa"])) == [[0, 0]]


@pytest.mark.parametrize(
    ("cuda", "bf16", "needs"),
    [
        (False, True, "a CUDA device, and torch finds none"),
        (True, False, "bf16; add --bf16"),
        (True, True, "transformer-engine, which cannot be imported"),
    ],
)
def test_transformer_engine_is_refused_for_what_it_lacks_and_never_taken_unasked(monkeypatch, cuda, bf16, needs):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with pytest.raises(UserError, match=f"^--transformer-impl transformer_engine needs {needs}.* or leave it out.$"):
        check_implementation("transformer_engine", bf16=bf16)
    check_implementation("local", bf16=bf16)
    monkeypatch.setattr(llama, "HAVE_TE", True)
    assert layer_spec("local").submodules.input_layernorm is RMSNorm


def run_with_state_of_norms(folder: str) -> dict[str, Any]:
    """Names of what a checkpoint has of a model whose norms have a state of their own, and whether it loads again."""
    from hft_megatron.checkpoint.store import METADATA

    class Norm(RMSNorm):
        """As transformer-engine's, which keeps bytes beside its weight."""

        def get_extra_state(self) -> torch.Tensor:
            return torch.tensor([7], dtype=torch.uint8)

        def set_extra_state(self, state: torch.Tensor) -> None:
            assert state.tolist() == [7]

    with patch.object(llama, "RMSNorm", Norm):
        (model,), _, _ = build_from_folder(folder, {})
    names = model.sharded_state_dict(metadata=dict(METADATA))
    missing, unexpected = model.load_state_dict(model.state_dict())
    return {
        "states": sorted(name for name, value in names.items() if "norm" in name and isinstance(value, ShardedObject)),
        "weights": [name for name, _ in model.named_parameters() if name not in names],
        "does not fit": [*missing, *unexpected],
    }


def test_norms_with_a_state_of_their_own_are_described_and_loaded(ranks, folders):
    [found] = ranks(1).run(run_with_state_of_norms, folder=str(folders["gqa"]))
    norms = [
        f"decoder.layers.{layer}.{name}" for layer in range(4) for name in ("input_layernorm", "pre_mlp_layernorm")
    ]
    assert found["states"] == sorted(f"{norm}._extra_state" for norm in [*norms, "decoder.final_layernorm"])
    assert (found["weights"], found["does not fit"]) == ([], [])
