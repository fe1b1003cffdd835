"""When a save folder holds another run. Run: pytest tests/config/test_run_identity.py"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hft_megatron.config.adapters import Adapters
from hft_megatron.config.data import DataConfig
from hft_megatron.config.hft import CHOICE_OF_UNITS, HFTConfig
from hft_megatron.config.model_shape import Llama3RopeScaling, ModelShape
from hft_megatron.config.parallel import ParallelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import RUN_IDENTITY_FILE
from hft_megatron.config.run_identity import RunIdentity, check_same_model, check_same_run, run_identity
from hft_megatron.config.training import TrainingConfig
from hft_megatron.errors import UserError

SHAPE = ModelShape(
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=301,
    max_position_embeddings=128,
    rope_scaling=Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
)
CONFIG = RunConfig(
    training=TrainingConfig(global_batch_size=8), data=DataConfig(train_data_path=("/data/train.jsonl",))
)


def changed(**values: Any) -> RunIdentity:
    """The identity with other values, those of options among them."""
    options = {name: values.pop(name) for name in list(values) if name in identity().options}
    return replace(identity(), options={**identity().options, **options}, **values)


def identity(config: RunConfig = CONFIG, world_size: int = 4) -> RunIdentity:
    return run_identity(config, SHAPE, world_size, method="sft", data_digest="0" * 64)


def test_an_identity_survives_json() -> None:
    for kept in (identity(), changed(rampup_batch_size=(2, 2, 9))):
        assert RunIdentity.from_dict(json.loads(json.dumps(kept.to_dict()))) == kept


def test_another_layout_length_or_place_of_the_data_is_the_same_run() -> None:
    moved = replace(
        CONFIG,
        parallel=ParallelConfig(tensor_model_parallel_size=2),
        training=replace(CONFIG.training, train_iters=7, micro_batch_size=2),
        data=DataConfig(train_data_path=("/elsewhere/train.jsonl",)),
    )
    check_same_run(identity(), identity(moved, world_size=2), "runs/a")


def test_a_command_that_trains_nothing_does_not_differ_in_its_data() -> None:
    check_same_run(identity(), replace(identity(), data_digest=None, data_path=None), "runs/a")


def test_every_option_that_fixes_the_plans_is_part_of_the_identity() -> None:
    assert identity().to_dict().keys() >= {*CHOICE_OF_UNITS, "hft_plan_digest"}
    assert identity().options.keys() == {
        *(name for name in CHOICE_OF_UNITS if name != "hft_seed"),
        *("hft_round_interval", "hft_moments", "hft_frozen_moments"),
        *("rampup_batch_size", "accumulate_allreduce_grads_in_fp32", "reset_attention_mask", "eod_mask_loss"),
        *("packing", "packing_algorithm", "packing_window"),
        *("dpo_loss", "dpo_beta", "dpo_label_smoothing", "dpo_sft_weight"),
        *("ewc_lambda", "ewc_batches", "mofo_fraction"),
        *("objective", "kl_to_base", "ift_lambda", "ift_gamma", "ift_weights"),
    }
    changed = HFTConfig(hft_level="layer", hft_rotation="fixed", hft_train="*.q_proj", hft_round_interval="epoch")
    saved = identity(replace(CONFIG, hft=changed)).to_dict()
    assert {
        name: saved[name] for name in saved if name.startswith("hft_") and saved[name] != identity().to_dict()[name]
    } == {
        "hft_level": "layer",
        "hft_rotation": "fixed",
        "hft_train": "*.q_proj",
        "hft_round_interval": "epoch",
    }


def test_a_file_from_before_an_option_existed_means_its_default() -> None:
    saved = identity().to_dict()
    old = {
        name: value
        for name, value in saved.items()
        if not name.startswith(("hft_", "packing")) or name in ("hft_ratio", "hft_seed")
    }
    assert len(old) < len(saved)
    assert RunIdentity.from_dict(old) == identity()


@pytest.mark.parametrize(
    ("source", "moves", "found"),
    [
        ("all/first", "all", "moved/first"),
        ("all/first", "all/second", "all/first"),
        ("elsewhere", "all", "elsewhere"),
    ],
    ids=["with its source", "alone", "away from a source that was not beside it"],
)
def test_a_run_that_is_moved_knows_where_the_run_is_that_it_started_from(
    source: str, moves: str, found: str, tmp_path: Path
) -> None:
    for folder in (tmp_path / "all" / "second", tmp_path / source):
        folder.mkdir(parents=True)
    tuned = replace(identity(), finetuned_from=str(tmp_path / source))
    (tmp_path / "all" / "second" / RUN_IDENTITY_FILE).write_text(json.dumps(tuned.to_dict()))
    assert RunIdentity.read("--save", str(tmp_path / "all" / "second")) == tuned
    (tmp_path / moves).rename(tmp_path / "moved")
    run = tmp_path / "moved" if moves == "all/second" else tmp_path / "moved" / "second"
    assert RunIdentity.read("--save", str(run)).finetuned_from == str(tmp_path / found)


def test_a_source_that_a_link_leads_to_has_one_name(tmp_path: Path) -> None:
    (tmp_path / "moved" / "first").mkdir(parents=True)
    (tmp_path / "moved" / "second").mkdir()
    (tmp_path / "all").symlink_to(tmp_path / "moved")
    tuned = replace(identity(), finetuned_from=str(tmp_path / "all" / "first"))
    (tmp_path / "moved" / "second" / RUN_IDENTITY_FILE).write_text(json.dumps(tuned.to_dict()))
    found = RunIdentity.read("--save", str(tmp_path / "all" / "second"))
    assert found.finetuned_from == str(tmp_path / "moved" / "first")


def test_a_plan_file_is_the_same_one_when_its_content_is(tmp_path: Path) -> None:
    identities = []
    for name, text in (("a.json", "{}"), ("b.json", "{}"), ("c.json", "{ }")):
        (tmp_path / name).write_text(text)
        identities.append(identity(replace(CONFIG, hft=HFTConfig(hft_plan=str(tmp_path / name)))))
    check_same_run(identities[0], identities[1], "runs/a")
    with pytest.raises(
        UserError, match=r"its --hft-plan is .*/a\.json \(digest .*this command's is .*/c\.json \(digest"
    ):
        check_same_run(identities[0], identities[2], "runs/a")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rampup_batch_size": (2, 2, 9)}, "its --rampup-batch-size is None, but this command's is 2 2 9"),
        ({"method": "dpo"}, "its method is sft, but this command's is dpo"),
        ({"shape": replace(SHAPE, num_layers=4)}, "its model's num layers is 8, but this command's is 4"),
        ({"shape": replace(SHAPE, rope_scaling=None)}, "its model's rope scaling is Llama3RopeScaling"),
        (
            {"data_digest": "1" * 64, "data_path": "/data/other.jsonl"},
            "its training data is /data/train.jsonl (digest 000000000000), "
            "but this command's is /data/other.jsonl (digest 111111111111)",
        ),
        ({"seq_length": 64}, "its --seq-length is 128, but this command's is 64"),
        ({"global_batch_size": 16}, "its --global-batch-size is 8, but this command's is 16"),
        ({"seed": 1}, "its --seed is 1234, but this command's is 1"),
        ({"hft_ratio": 1.0}, "its --hft-ratio is 0.5, but this command's is 1.0"),
        ({"hft_seed": 1}, "its --hft-seed is 1234, but this command's is 1"),
        ({"hft_level": "layer"}, "its --hft-level is category, but this command's is layer"),
        ({"hft_selection": "lisa"}, "its --hft-selection is random, but this command's is lisa"),
        ({"hft_counting": "parameters"}, "its --hft-counting is matrices, but this command's is parameters"),
        ({"hft_pairing": "complementary"}, "its --hft-pairing is independent, but this command's is complementary"),
        ({"hft_rotation": "fixed"}, "its --hft-rotation is independent, but this command's is fixed"),
        ({"hft_freeze_embedding": True}, "its --hft-freeze-embedding is False, but this command's is True"),
        ({"hft_freeze_head": True}, "its --hft-freeze-head is False, but this command's is True"),
        ({"hft_train": "*.q_proj"}, "its --hft-train is None, but this command's is *.q_proj"),
        ({"hft_freeze": "*.q_proj"}, "its --hft-freeze is None, but this command's is *.q_proj"),
        ({"hft_round_interval": "5"}, "its --hft-round-interval is stage, but this command's is 5"),
        ({"packing": True}, "its --packing is False, but this command's is True"),
        ({"packing_window": 9}, "its --packing-window is 4096, but this command's is 9"),
        (
            {"packing_algorithm": "first_fit_shuffle"},
            "its --packing-algorithm is first_fit_decreasing, but this command's is first_fit_shuffle",
        ),
        (
            {"hft_plan": "a.json", "hft_plan_digest": "1" * 64},
            "its --hft-plan is None, but this command's is a.json (digest 111111111111)",
        ),
    ],
)
def test_another_run_in_the_folder_is_named_with_both_values(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        check_same_run(identity(), changed(**change), "runs/a")
    assert str(error.value).startswith("--save runs/a holds another run: ")
    assert said in str(error.value)


def test_a_new_run_from_adapters_may_change_their_dropout_and_nothing_else() -> None:
    adapters = Adapters(rank=4, alpha=8.0, dropout=0.1, targets=("q_proj",))
    with_adapters = changed(shape=replace(SHAPE, adapters=adapters))

    def other(**values: Any) -> RunIdentity:
        return changed(shape=replace(SHAPE, adapters=replace(adapters, **values)))

    check_same_model(with_adapters, other(dropout=0.0), "run")
    with pytest.raises(UserError, match=r"another run: its adapters' dropout is 0.1, but this command's is 0.0"):
        check_same_run(with_adapters, other(dropout=0.0), "run")
    for saved, new, sentence in (
        (with_adapters, other(rank=8), "whose adapters have rank 4, .*, but this command's have rank 8"),
        (identity(), with_adapters, "which has no adapters, .* write that run's model with `hft-megatron"),
        (
            with_adapters,
            identity(),
            r"which trained adapters \(rank 4, .*, but this command has none; give the same --lora",
        ),
    ):
        with pytest.raises(UserError, match=f"--finetune takes the weights of --load run, {sentence}"):
            check_same_model(saved, new, "run")
