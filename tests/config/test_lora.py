"""What adapters can be, and the sentences about what they cannot. Run: pytest tests/config/test_lora.py"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.adapters import TARGETS
from hft_megatron.config.exports import check_adapter_folder
from hft_megatron.config.lora import (
    LORA_RULES,
    AdapterNote,
    LoraConfig,
    adapters_fit_the_run,
    adapters_of,
    for_later_stages,
    note_dropout,
)
from hft_megatron.config.model_shape import ModelShape
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import RUN_IDENTITY_FILE
from hft_megatron.config.run_identity import run_identity
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import make_plan
from hft_megatron.hft.units import units_of

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=3,
    vocab_size=32,
    max_position_embeddings=64,
)
PEFT: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["v_proj", "q_proj"]}


def config(load_hf: str | None = "model", **options: Any) -> RunConfig:
    run = RunConfig()
    groups = {}
    for name in ("lora", "hft", "ewc", "checkpoint", "optimizer", "training"):
        group = getattr(run, name)
        groups[name] = replace(group, **{key: value for key, value in options.items() if hasattr(group, key)})
    return replace(run, model=replace(run.model, load_hf=load_hf), **groups)


def check(run: RunConfig) -> None:
    for rule in (*LORA_RULES, adapters_fit_the_run):
        rule(run, SHAPE, 1)


def test_all_seven_matrices_have_adapters_of_twice_the_rank_as_alpha_unless_others_are_named() -> None:
    adapters = adapters_of(LoraConfig(lora_rank=4))
    assert adapters is not None
    assert (adapters.alpha, adapters.scale, adapters.targets) == (8.0, 2.0, TARGETS)
    few = adapters_of(LoraConfig(lora_rank=4, lora_alpha=2, lora_targets="v_proj, q_proj"))
    assert few is not None
    assert (few.scale, few.targets) == (0.5, ("q_proj", "v_proj"))
    assert adapters_of(LoraConfig()) is None


def test_the_plan_of_a_model_with_adapters_trains_them_all_and_nothing_else() -> None:
    shape = replace(SHAPE, adapters=adapters_of(LoraConfig(lora_rank=4, lora_targets="k_proj,down_proj")))
    for round in (0, 3):
        plan = make_plan(shape, RunConfig().hft, default_seed=1, round=round)
        # Of k_proj 6 x 8, of down_proj 8 x 12.
        assert plan.trainable_parameters == 2 * 4 * ((6 + 8) + (8 + 12))
        assert {name.rpartition(".")[2] for name in plan.training} == {"lora_A", "lora_B"}
        assert "all adapters" in plan.describe()
    assert [unit for unit in units_of(shape) if unit.category != "adapter"] == list(units_of(shape.base))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lora_alpha": 8.0}, "--lora-alpha 8.0 needs --lora-rank"),
        ({"save_lora": "out"}, "--save-lora out needs --lora-rank"),
        ({"lora_rank": 4, "lora_targets": "q_proj,lm_head"}, "lm_head is not one of q_proj"),
        ({"lora_rank": 4, "lora_targets": "all-linear"}, "down_proj; leave --lora-targets out for all of them."),
        ({"lora_rank": 4, "hft_freeze_embedding": True}, "--hft-freeze-embedding chooses which of the model's"),
        ({"lora_rank": 4, "hft_ratio": 0.25}, "--hft-ratio 0.25 chooses which of the model's weights train"),
        ({"lora_rank": 4, "hft_selection": "lisa"}, "--hft-selection lisa chooses"),
        ({"lora_rank": 4, "hft_plan": "plan.json"}, "--hft-plan plan.json chooses"),
        ({"lora_rank": 4, "hft_round_interval": "50"}, "--hft-round-interval 50 begins rounds"),
        ({"lora_rank": 4, "load_hf": None}, "give its folder with --load-hf"),
        ({"lora_rank": 4, "ewc_lambda": 2.0}, "--ewc-lambda 2 penalises changes of the model's own weights"),
        ({"lora_rank": 4, "decoupled_lr": 1e-3}, "--decoupled-lr 0.001 is the learning rate of embedding and head"),
    ],
)
def test_what_has_no_meaning_with_adapters_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    check(config(lora_rank=4, hft_ratio=1.0))
    check(config())
    with pytest.raises(UserError) as caught:
        check(config(**options))
    assert sentence in str(caught.value)


def adapter(folder: Path, **keys: Any) -> str:
    (folder / "adapter_config.json").write_text(json.dumps(PEFT | keys))
    (folder / "adapter_model.safetensors").touch()
    return str(folder)


def test_an_adapter_of_pefts_says_rank_alpha_and_targets(tmp_path: Path) -> None:
    found = adapters_of(LoraConfig(lora_adapter=adapter(tmp_path), lora_rank=4, lora_dropout=0.1))
    assert found is not None
    assert (found.rank, found.alpha, found.dropout, found.targets) == (4, 12.0, 0.1, ("q_proj", "v_proj"))
    with pytest.raises(UserError, match=r"--lora-rank 8: the adapter of --lora-adapter .* has 4"):
        adapters_of(LoraConfig(lora_adapter=str(tmp_path), lora_rank=8))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"use_dora": True}, "use_dora = True, which is not supported"),
        ({"use_rslora": True}, "use_rslora = True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = "),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern = "),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = "),
        ({"target_modules": ["lm_head"]}, "target_modules = "),
        ({"target_modules": ".*proj"}, "target_modules = "),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"r": 0}, "r = 0"),
        ({"lora_alpha": -1}, "lora_alpha = -1"),
        ({"lora_alpha": float("inf")}, "lora_alpha = inf"),
        ({"target_modules": [["q_proj"]]}, "target_modules = [['q_proj']]"),
        ({"layers_to_transform": 0}, "layers_to_transform = 0"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4', which is not"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"init_lora_weights": "mica"}, "init_lora_weights = 'mica'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens = [1, 2]"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora = "),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config = "),
        ({"monteclora_config": {"num_samples": 2}}, "monteclora_config = "),
        ({"of_a_later_version": 1}, "of_a_later_version = 1"),
    ],
)
def test_what_an_adapter_can_have_and_we_do_not_is_refused_by_name(
    tmp_path: Path, keys: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        adapters_of(LoraConfig(lora_adapter=adapter(tmp_path, **keys)))
    assert sentence in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_keys_that_only_say_how_an_adapter_began_are_passed_over(tmp_path: Path) -> None:
    began: dict[str, Any] = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "loftq_config": {}}
    began |= {"revision": None, "bias": "none"}
    began |= {"task_type": "CAUSAL_LM", "inference_mode": True, "peft_version": "0.21.2", "qalora_group_size": 16}
    began |= {"megatron_core": "megatron.core", "use_dora": False, "rank_pattern": {}, "exclude_modules": None}
    assert adapters_of(LoraConfig(lora_adapter=adapter(tmp_path, **began))) is not None


def test_an_adapter_is_taken_from_one_place_and_a_later_stage_has_its_numbers_alone(tmp_path: Path) -> None:
    folder = adapter(tmp_path, lora_dropout=0.05)
    given = LoraConfig(lora_adapter=folder, lora_dropout=0.1)
    with pytest.raises(UserError, match=f"--lora-adapter {folder} gives the adapters to start from, and so does"):
        check(config(lora_adapter=folder, finetune=True, load="other"))
    later = for_later_stages(given)
    assert later == LoraConfig(lora_rank=4, lora_alpha=12.0, lora_targets="q_proj,v_proj", lora_dropout=0.1)
    assert adapters_of(later) == adapters_of(given)
    assert note_dropout(given) == [
        f"--lora-adapter {folder} has lora_dropout 0.05, which is not used: this run has --lora-dropout 0.1"
    ]
    assert note_dropout(later) == note_dropout(replace(given, lora_dropout=0.05)) == []


def test_an_adapter_has_a_folder_of_its_own_but_for_the_same_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, filled = tmp_path / "run", tmp_path / "filled"
    for folder in (run, filled):
        folder.mkdir()
    (filled / "file").touch()
    identity = replace(run_identity(RunConfig(), SHAPE, 1, method="sft", data_digest=None), run_id="mine")
    (run / RUN_IDENTITY_FILE).write_text(json.dumps(identity.to_dict()))
    for target, sentence in (
        (".", "is the current folder"),
        (tmp_path, "is the current folder"),
        ("out/../run", "and --save run are the same folder, or one is inside the other"),
        ("run/adapter", "and --save run are the same folder, or one is inside the other"),
        ("whole", "and --save-hf whole/model are the same folder, or one is inside the other"),
        ("filled", "already exists; choose a new folder"),
    ):
        with pytest.raises(UserError) as caught:
            check_adapter_folder(config(save_lora=str(target), save="run", save_hf="whole/model"))
        assert f"--save-lora {target} " in str(caught.value)
        assert sentence in str(caught.value)
    check_adapter_folder(config(save_lora="new", save="run", save_hf="whole/model"))
    AdapterNote(run="mine", iteration=6).write(filled)
    check_adapter_folder(config(save_lora="filled", save="run", train_iters=6))
    with pytest.raises(UserError, match="already holds the adapter of this run, of iteration 6; choose a new folder"):
        check_adapter_folder(config(save_lora="filled", save="run", train_iters=7))
    AdapterNote(run="another", iteration=6).write(filled)
    with pytest.raises(UserError, match="already exists"):
        check_adapter_folder(config(save_lora="filled", save="run", train_iters=6))


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
        adapters_of(LoraConfig(lora_adapter=str(tmp_path)))
    adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="weights are read from safetensors only"):
        adapters_of(LoraConfig(lora_adapter=str(tmp_path)))
