"""What a file of stages means, and mistakes in it. Run: pytest tests/config/test_stages.py"""

from dataclasses import replace
from pathlib import Path

import pytest

from hft_megatron.config.checkpoint import CheckpointConfig
from hft_megatron.config.hft import HFTConfig
from hft_megatron.config.lora import LoraConfig
from hft_megatron.config.model import ModelConfig
from hft_megatron.config.optimizer import OptimizerConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.stages import read_stages, with_one_schedule, with_rounds_in_turn
from hft_megatron.config.tracking import LoggingConfig
from hft_megatron.config.training import TrainingConfig
from hft_megatron.errors import UserError
from tests.config.test_lora import adapter

BASE = RunConfig(
    model=ModelConfig(load_hf="model"),
    checkpoint=CheckpointConfig(save="run", load="run", save_hf="out", save_interval=5, save_hf_interval=5),
)


def stages_of(tmp_path: Path, text: str, base: RunConfig = BASE) -> tuple[object, ...]:
    file = tmp_path / "stages.yaml"
    file.write_text(text)
    return read_stages(str(file), base)


def test_a_stage_has_its_own_options_its_folder_and_the_weights_of_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "- method: sft\n  train_data_path: [a.jsonl, b.jsonl]\n  lr: 2e-5\n- {method: dpo, dpo: {dpo-beta: 0.3}}\n"
    )
    first, second = with_rounds_in_turn(read_stages(str(tmp_path / "s.yaml"), BASE))
    assert (first.method, second.method) == ("sft", "dpo")
    assert first.config.data.train_data_path == ("a.jsonl", "b.jsonl")
    assert second.config.data.train_data_path == ()
    assert (first.config.optimizer.lr, second.config.optimizer.lr) == (2e-5, BASE.optimizer.lr)
    assert second.config.dpo.dpo_beta == 0.3
    one, two = first.config.checkpoint, second.config.checkpoint
    assert (one.save, one.load, one.finetune, one.save_hf) == ("run/stage_0_sft", "run/stage_0_sft", False, None)
    assert (two.save, two.load, two.finetune, two.save_hf) == ("run/stage_1_dpo", "run/stage_0_sft", True, "out")
    assert one.save_interval == two.save_interval == 5
    assert (one.save_hf_interval, two.save_hf_interval) == (None, 5)
    assert [stage.config.hft.hft_first_round for stage in (first, second)] == [0, 1]


def test_a_stage_exports_where_it_says_and_the_last_one_where_all_were_told_to(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("- method: sft\n  save_hf: first\n  save_dtype: float16\n- method: sft\n- method: dpo\n")
    written = [stage.config.checkpoint for stage in read_stages(str(file), BASE)]
    assert [one.save_hf for one in written] == ["first", None, "out"]
    assert [one.save_dtype for one in written] == ["float16", None, None]
    assert [one.save_hf_interval for one in written] == [5, None, 5]


def test_the_last_stage_alone_writes_the_adapter_that_all_train_one_after_the_other(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("- method: sft\n  save_hf: first\n- method: sft\n  lora_dropout: 0.1\n- method: dpo\n")
    base = replace(
        BASE, lora=LoraConfig(lora_rank=4), checkpoint=replace(BASE.checkpoint, save_lora="adapter", save_hf="out")
    )
    stages = read_stages(str(file), base)
    assert [stage.config.checkpoint.save_lora for stage in stages] == [None, None, "adapter"]
    assert [stage.config.lora.lora_dropout for stage in stages] == [0.0, 0.1, 0.0]
    given = replace(base, lora=LoraConfig(lora_adapter=adapter(tmp_path)))
    first, *later = [stage.config.lora for stage in read_stages(str(file), given)]
    assert first.lora_adapter == str(tmp_path)
    assert [(one.lora_adapter, one.lora_rank, one.lora_alpha) for one in later] == [(None, 4, 12.0)] * 2


def test_stages_with_one_schedule_have_their_parts_of_it(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("- {method: sft, lr: 1e-3}\n- {method: sft}\n")
    base = replace(BASE, optimizer=OptimizerConfig(lr_warmup_iters=5), training=TrainingConfig(global_batch_size=2))
    stages = read_stages(str(tmp_path / "s.yaml"), base)
    found = [stage.config.optimizer for stage in with_one_schedule(stages, (4, 6))]
    assert [(one.lr, one.lr_schedule_start, one.lr_schedule_iters) for one in found] == [(1e-3, 0, 10), (1e-5, 4, 10)]
    with pytest.raises(UserError, match="--lr-warmup-iters 5 must be below --lr-schedule-iters 5"):
        with_one_schedule(stages, (4, 1))
    for training, sentence in (
        (TrainingConfig(train_samples=9, global_batch_size=2), "--train-samples 9 makes a schedule of samples"),
        (TrainingConfig(), "--global-batch-size is missing: one schedule over all tasks needs"),
    ):
        stages = read_stages(str(tmp_path / "s.yaml"), replace(BASE, training=training))
        with pytest.raises(UserError, match=sentence):
            with_one_schedule(stages, (4, 6))


def test_without_a_run_to_resume_the_first_stage_starts_where_the_run_does(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("- method: dpo\n")
    fresh = replace(BASE, checkpoint=replace(BASE.checkpoint, load=None))
    [stage] = read_stages(str(tmp_path / "s.yaml"), fresh)
    assert stage.config.checkpoint.load is None
    other = replace(BASE, checkpoint=replace(BASE.checkpoint, load="other", finetune=True))
    [stage] = read_stages(str(tmp_path / "s.yaml"), other)
    assert (stage.config.checkpoint.load, stage.config.checkpoint.finetune) == ("other", True)


def test_curves_of_stages_have_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("- method: sft\n- method: dpo\n  tensorboard_dir: mine\n  wandb_exp_name: mine\n")
    logging = LoggingConfig(tensorboard_dir="curves", wandb_project="project", wandb_exp_name="tuning")
    first, second = read_stages(str(tmp_path / "s.yaml"), replace(BASE, logging=logging))
    shown = [(one.config.logging.tensorboard_dir, one.config.logging.wandb_exp_name) for one in (first, second)]
    assert shown == [("curves/stage_0_sft", "tuning-stage_0_sft"), ("mine", "mine")]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("method: sft\n", "must hold a list of stages"),
        ("", "must hold a list of stages"),
        ("- lr: 1e-3\n", r"stages.yaml:1: a stage must begin with `method:`"),
        ("- sft\n", r"stages.yaml:1: a stage must begin with `method:`"),
        ("- method: sft\n- method: ppo\n", r"stages.yaml:2: the method ppo is not one of .*sft.*dpo"),
        ("- method: sft\n  lrr: 1\n", r"stages.yaml:2: lrr is not an option; the nearest is --lr"),
        ("- method: sft\n  lr: fast\n", r"stages.yaml:2: lr fast: the value must be a number"),
        ("- method: sft\n  lr: 1\n  lr: 2\n", r"stages.yaml:3: lr is set twice"),
        ("- method: sft\n  save: here\n", r"stages.yaml:1: save cannot be set for one stage; give --save for all"),
        (
            "- method: sft\n  save_dtype: bfloat16\n",
            r"stages.yaml:1: save_dtype cannot be set for one stage; .*or also give the stage a save_hf",
        ),
        (
            "- method: sft\n  save_hf: a\n- method: sft\n  save_hf: ./a\n",
            r"stages.yaml:3: save_hf ./a is the export folder of an earl",
        ),
        (
            "- method: sft\n- method: dpo\n  train_iters: 0\n",
            r"stages.yaml:2: a stage with --train-iters 0 leaves no w",
        ),
        ("- method: sft\n  load_hf: other\n", r"stages.yaml:1: a stage cannot have a model of its own"),
        ("- method: sft\n- method: sft\n  lora_rank: 4\n", r"stages.yaml:2: a stage cannot have its own adapters"),
        (
            "- method: sft\n  save_hf: a\n  save_lora: b\n- method: sft\n  save_hf: c\n  save_lora: ./b\n",
            r"stages.yaml:4: save_lora ./b is the export folder of an earlier stage",
        ),
        ("- method: sft\n bad\n", r"stages.yaml:\d+ is not valid YAML"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        stages_of(tmp_path, text)


def test_stages_need_a_folder_and_number_their_rounds_themselves(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs --save"):
        stages_of(tmp_path, "- method: sft\n", RunConfig(model=ModelConfig(load_hf="model")))
    with pytest.raises(UserError, match="--hft-first-round 1: --stages numbers the rounds itself"):
        stages_of(tmp_path, "- method: sft\n", replace(BASE, hft=HFTConfig(hft_first_round=1)))
