"""What names of transformers, TRL, LLaMA-Factory and ms-swift are told.

Run: pytest tests/config/test_other_trainers.py
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from hft_megatron.cli.entry import commands
from hft_megatron.config import conversions
from hft_megatron.config.flags import flags_of
from hft_megatron.config.given import LEAVE, Given
from hft_megatron.config.loading import load_options, options_of
from hft_megatron.config.megatron_flags import OF_OTHER_COMMANDS, ROWS
from hft_megatron.config.megatron_rows import Row
from hft_megatron.config.other_trainers import OTHER_TRAINERS
from hft_megatron.config.run import RunConfig
from hft_megatron.data.templates import BUILT_IN
from hft_megatron.errors import UserError
from tests.support.answered_values import NAMED_VALUES, VALUES

OPTIONS = {name: flags_of(command.options) for name, command in commands().items()}
OTHERS = [row for section in OTHER_TRAINERS for row in section.rows]


def answers(words: str, method: str = "sft") -> list[str]:
    """What a command says of these words, a line for each."""
    with pytest.raises(UserError) as error:
        load_options(commands()[method].options, shlex.split(words), others=OPTIONS)
    first, *lines = str(error.value).splitlines()
    return [line.strip() for line in lines] or [first]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--learning_rate 2e-5", "--learning_rate 2e-5: give --lr 2e-5."),
        ("--learning-rate=2e-5", "--learning-rate 2e-5: give --lr 2e-5."),
        ("--num_train_epochs 3.0", "--num_train_epochs 3.0: give --train-epochs 3."),
        (
            "--num_train_epochs 2.5",
            "--num_train_epochs 2.5: give --train-epochs with a whole number, or the length as --train-iters or "
            "--train-samples.",
        ),
        ("--max_steps 500", "--max_steps 500: give --train-iters 500."),
        ("--max_steps -1", "--max_steps -1: leave it out."),
        ("--warmup_ratio 0.03", "--warmup_ratio 0.03: give --lr-warmup-fraction 0.03."),
        ("--warmup_steps 100", "--warmup_steps 100: give --lr-warmup-iters 100."),
        ("--warmup_steps 0.1", "--warmup_steps 0.1: give --lr-warmup-fraction 0.1."),
        ("--lr_scheduler_type cosine", "--lr_scheduler_type cosine: give --lr-decay-style cosine."),
        (
            "--lr_scheduler_type warmup_stable_decay",
            "--lr_scheduler_type warmup_stable_decay: give --lr-decay-style WSD and --lr-wsd-decay-style cosine, "
            "and --lr-wsd-decay-iters.",
        ),
        (
            "--lr_scheduler_type polynomial",
            "--lr_scheduler_type polynomial: give --lr-decay-style with constant, linear, cosine, inverse-square-root "
            "or WSD.",
        ),
        (
            "--lr_scheduler_type constant",
            "--lr_scheduler_type constant: give --lr-decay-style constant, without a warm-",
        ),
        ("--max_grad_norm 0.5", "--max_grad_norm 0.5: give --clip-grad 0.5."),
        (
            "--gradient_checkpointing true",
            "--gradient_checkpointing true: give --recompute-granularity full --recompute-method uniform "
            "--recompute-num-layers 1.",
        ),
        ("--gradient_checkpointing False", "--gradient_checkpointing False: leave it out."),
        (
            "--gradient_accumulation_steps 8",
            "--gradient_accumulation_steps 8: give --global-batch-size, --micro-batch-size x 8 x the data-parallel "
            "ranks.",
        ),
        (
            "--gradient_accumulation_steps 8 --micro-batch-size 4",
            "--gradient_accumulation_steps 8: give --global-batch-size, 4 x 8 x the data-parallel ranks: 32 for one "
            "rank, 256 for 8.",
        ),
        ("--save_strategy no", "--save_strategy no: leave out both it and --save-interval; with --save the last "),
        ("--save_strategy best", "--save_strategy best: give --save-hf-best with a metric of the validation, such "),
        ("--eval_strategy no", "--eval_strategy no: leave out both it and --eval-interval."),
        ("--logging_strategy no", "--logging_strategy no: a run always logs; give a large --log-interval."),
        ("--save_strategy steps", "--save_strategy steps: leave it out; --save-interval has the iterations."),
        ("--eval_strategy epoch", "--eval_strategy epoch: give --eval-interval, in iterations."),
        ("--save_steps 0.1", "--save_steps 0.1: give --save-interval in iterations."),
        ("--logging_steps 10", "--logging_steps 10: give --log-interval 10."),
        ("--report_to wandb", "--report_to wandb: give --wandb-project NAME."),
        (
            "--report_to wandb tensorboard",
            "--report_to wandb tensorboard: give --tensorboard-dir FOLDER and --wandb-project NAME.",
        ),
        ("--report_to none", "--report_to none: leave it out."),
        ("--ddp_timeout 1800", "--ddp_timeout 1800: give --distributed-timeout-minutes 30."),
        ("--ddp_timeout 180000000", "--ddp_timeout 180000000: give --distributed-timeout-minutes 3000000."),
        ("--ddp_timeout 100", "--ddp_timeout 100: give --distributed-timeout-minutes 1.67."),
        ("--warmup_steps 2000000", "--warmup_steps 2000000: give --lr-warmup-iters 2000000."),
        ("--loss_scale all", "--loss_scale all: give --loss-on all."),
        ("--loss_scale last_round", "--loss_scale last_round: give --loss-on last."),
        ("--loss_scale default", "--loss_scale default: leave it out; --loss-on assistant is the default."),
        ("--loss_scale react", "--loss_scale react: give --loss-on with the tokens that train: assistant, last or "),
        ("--loss-scale 128", "--loss-scale 128: bf16 and fp32 scale no loss; leave it out, or give 1."),
        (
            "--finetuning_type freeze",
            "--finetuning_type freeze: give --hft-ratio 0, and --hft-train with patterns of the names that train; "
            "--hft-freeze-embedding, --hft-freeze-head and --hft-freeze model.norm freeze the rest.",
        ),
        (
            "--padding_free true",
            "--padding_free true: padding costs time, not quality; leave it out, or give --packing",
        ),
        ("--neat_packing on", "--neat_packing on: give --packing; batch sizes then count packs."),
        (
            "--truncation_strategy left",
            "--truncation_strategy left: the beginning is never cut off; give --long-examples truncate, which cuts ",
        ),
        ("--truncation_strategy raise", "--truncation_strategy raise: give --long-examples with drop, truncate or sp"),
        ("--val_size 0", "--val_size 0: leave it out."),
        ("--val_size 0.1", "--val_size 0.1: give --valid-data-path with files that are kept back from training."),
        ("--eaft_alpha 1.0", "--eaft_alpha 1.0: the exponent of --objective eaft is 1, and no other is built; leave "),
        ("--badam_switch_interval 50", "--badam_switch_interval 50: give --hft-round-interval 50."),
        (
            "--output_dir 'my runs'",
            "--output_dir 'my runs': give --save 'my runs' for checkpoints, and --save-hf FOLDER for the model at the "
            "end.",
        ),
        (
            "--model_name_or_path meta-llama/Llama-3.1-8B",
            "--model_name_or_path meta-llama/Llama-3.1-8B: give --load-hf with the folder of the model: `hf download "
            "meta-llama/Llama-3.1-8B --local-dir FOLDER` makes it.",
        ),
        ("--model /models/a", "--model /models/a: give --load-hf /models/a."),
        ("--lora_r 16", "--lora_r 16: give --lora-rank 16."),
        ("--lora_target q_proj,v_proj", "--lora_target q_proj,v_proj: give --lora-targets q_proj,v_proj."),
        (
            "--lora_target_modules q_proj v_proj",
            "--lora_target_modules q_proj v_proj: give --lora-targets q_proj,v_proj.",
        ),
        ("--target_modules all-linear", "--target_modules all-linear: leave it out; all seven matrices of a "),
        ("--finetuning_type full", "--finetuning_type full: give --hft-ratio 1; without it half of the matrices "),
        ("--finetuning_type lora", "--finetuning_type lora: give --lora-rank with the rank."),
        (
            "--train_type lora --lora_rank 8",
            "--train_type lora: leave it out; --lora-rank 8 sets it.",
        ),
        ("--template llama3", "--template llama3: give --chat-template llama3."),
        ("--template qwen", "--template qwen: give --chat-template with one of plain, tulu, llama2, llama3, "),
        ("--cutoff_len 2048", "--cutoff_len 2048: give --seq-length 2048, and --long-examples truncate to cut "),
        ("--train_on_prompt true", "--train_on_prompt true: give --loss-on all."),
        ("--assistant_only_loss false", "--assistant_only_loss false: give --loss-on all."),
        ("--torch_dtype bfloat16", "--torch_dtype bfloat16: give --bf16."),
        ("--stage sft", "--stage sft: the command sets it, `hft-megatron sft`; leave it out."),
        ("--stage rm", "--stage rm: rm is not supported; the commands are `hft-megatron sft`, `dpo` and `pretrain`."),
        ("--deepspeed ds.json", "--deepspeed ds.json: data parallelism shards the optimizer's state alone, as ZeRO "),
        ("--loss_type dft", "--loss_type dft: give --objective dft."),
        ("--tensor_parallel_size 2", "--tensor_parallel_size 2: give --tensor-model-parallel-size 2."),
    ],
)
def test_a_name_is_answered_with_the_option_and_the_value_it_has_here(words: str, said: str) -> None:
    [answer] = answers(words)
    assert answer.startswith(said)
    assert answer.endswith(".")


def test_names_of_preference_tuning_are_answered() -> None:
    words = "--beta 0.2 --loss_type sigmoid --pref_loss simpo --pref_ftx 0.1 --precompute_ref_log_probs false"
    assert answers(words, "dpo") == [
        "--beta 0.2: give --dpo-beta 0.2.",
        "--loss_type sigmoid: give --dpo-loss sigmoid.",
        "--pref_loss simpo: give --dpo-loss with one of sigmoid, ipo, hinge.",
        "--pref_ftx 0.1: give --dpo-sft-weight 0.1.",
        "--precompute_ref_log_probs false: give --dpo-reference shared or model.",
    ]


def test_files_that_are_there_are_named_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).touch()
    [answer] = answers("--dataset a.jsonl,b.jsonl")
    assert answer == "--dataset a.jsonl,b.jsonl: give --train-data-path a.jsonl b.jsonl."
    [answer] = answers("--dataset alpaca_en")
    assert answer == "--dataset alpaca_en: give --train-data-path with the files of the data."


def test_a_whole_command_of_transformers_is_answered_at_once_and_each_value_by_those_beside_it() -> None:
    words = (
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 8 --num_train_epochs 3 --max_steps 100 "
        "--bf16 true --weight_decay 0.1 --packing true"
    )
    assert answers(words) == [
        "--per_device_train_batch_size 2: give --micro-batch-size 2.",
        "--gradient_accumulation_steps 8: give --global-batch-size, 2 x 8 x the data-parallel ranks: 16 for one rank, "
        "128 for 8.",
        "--num_train_epochs 3: the steps of --max-steps take its place; leave it out.",
        "--max_steps 100: give --train-iters 100.",
        "--bf16 true: a switch takes no value; write --bf16.",
        "--packing true: a switch takes no value; write --packing.",
    ]


def test_names_in_a_file_are_answered_with_their_lines_whatever_their_values_are(tmp_path: Path) -> None:
    file = tmp_path / "llama.yaml"
    file.write_text(
        "bf16: true\nlearning_rate: 1.0e-4\nlora_target: [q_proj, v_proj]\nfsdp_config: {version: 2}\n"
        "resume_from_checkpoint: null\ngradient_checkpointing: true\n"
    )
    assert answers(f"--config {file}") == [
        f"{file}:2: learning_rate 1.0e-4: give --lr 1.0e-4.",
        f"{file}:3: lora_target q_proj v_proj: give --lora-targets q_proj,v_proj.",
        f"{file}:4: fsdp_config: {ROWS['fsdp-config'].words}.",
        f"{file}:6: gradient_checkpointing true: {ROWS['gradient-checkpointing'].words}.",
    ]


def test_a_call_is_answered_too() -> None:
    with pytest.raises(UserError, match=r"^learning_rate 2e-05: give --lr 2e-05\.$"):
        options_of(RunConfig, {"learning_rate": 2e-5})


@pytest.mark.parametrize("row", OTHERS, ids=lambda row: row.name)
def test_every_value_is_answered_by_a_sentence(row: Row) -> None:
    for value in VALUES:
        words = [f"--{row.name}", *filter(None, [value])]
        if row.state == "accepted":
            continue
        [answer] = answers(shlex.join(words))
        assert answer.startswith(" ".join(words))
        assert not re.search(r"\bNone\b|  |\.\.$", answer), answer


@pytest.mark.parametrize("method", [name for name, flags in OPTIONS.items() if "train-iters" in flags])
def test_options_that_an_answer_names_are_those_of_the_command_or_it_says_whose_they_are(method: str) -> None:
    own = {f"--{name}" for name in OPTIONS[method]}
    own |= {f"--no-{name}" for name, flag in OPTIONS[method].items() if flag.is_switch}
    values = {choice for choices in (VALUES, NAMED_VALUES) for choice in choices}
    for row in (*ROWS.values(), *OF_OTHER_COMMANDS.values()):
        for value in values:
            text = row.refusal(f"--{row.name}", [value], Given(options=OPTIONS[method], others=OPTIONS))
            text = re.sub(r"`hft-megatron [a-z-]+ [^`]*`|`hf download [^`]*`", "", text.partition(" ")[2])
            named = set(re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", text)) - own
            theirs = {name for name in named if f"{name} is an option of `hft-megatron" in text}
            # An option of transformers', which the sentence is about.
            assert named - theirs <= {"--max-steps"}, (row.name, text)


@pytest.mark.parametrize(
    ("method", "words", "said"),
    [
        ("sft", "--beta 0.1", "--beta 0.1: --dpo-beta is an option of `hft-megatron dpo` and `doctor`, not of this"),
        ("dpo", "--beta 0.1", "--beta 0.1: give --dpo-beta 0.1."),
        ("dpo", "--loss_type nll", "--loss_type nll: --objective is an option of `hft-megatron sft`, `continual` and "),
        (
            "pretrain",
            "--num_train_epochs 2",
            "--num_train_epochs 2: a corpus has no epochs; give its length as --train",
        ),
        (
            "pretrain",
            "--neat_packing true",
            "--neat_packing true: --packing is an option of `hft-megatron sft`, `dpo` ",
        ),
        (
            "pretrain",
            "--cutoff_len 5",
            "--cutoff_len 5: give --seq-length 5, and --long-examples truncate to cut longer",
        ),
        (
            "sft",
            "--dpo-beta 0.1",
            "--dpo-beta is an option of `hft-megatron dpo` and `doctor`, not of this command; lea",
        ),
        ("pretrain", "--no-packing", "--no-packing is an option of `hft-megatron sft`, `dpo` and "),
        ("sft", "--rounds 2", "--rounds is an option of `hft-megatron plan`, not of this command; leave it out."),
        ("sft", "--ewc-lambda 1", "--ewc-lambda is an option of `hft-megatron continual` and `doctor`, not of this "),
    ],
)
def test_options_of_other_commands_are_told_by_command(method: str, words: str, said: str) -> None:
    [answer] = answers(words, method)
    assert answer.startswith(said)


SWITCHES = """
    activation_offloading adafactor assistant_only_loss completion_only_loss create_new_adapter dataset_shuffle
    disable_dropout disable_gradient_checkpointing disable_shuffling enable_dft_loss enable_liger_kernel eval_packing
    group_by_length ignore_pad_token_for_loss load_from_cache_file load_in_4bit load_in_8bit mask_history merge_lora
    neat_packing no_cuda overwrite_cache overwrite_output_dir padding_free pissa_init plot_loss
    precompute_ref_log_probs predict_with_generate pure_bf16 reference_free resize_vocab save_safetensors
    shuffle_dataset streaming sync_ref_model test_convert_precision to_hf to_mcore train_dataloader_shuffle
    train_on_prompt use_apollo use_asft_loss use_badam use_bnb_nested_quant use_dft_loss use_dora use_eaft_loss
    use_fast_tokenizer use_galore use_peft use_rslora use_swanlab use_unsloth use_vllm use_weighting
"""
"""Names whose value is true or false, beside those of TrainingArguments."""
OFF_ANSWERS = {
    "assistant-only-loss": "give --loss-on all",
    "completion-only-loss": "give --loss-on all",
    "disable-gradient-checkpointing": ROWS["gradient-checkpointing"].words,
    "do-train": "give --train-iters 0, which validates and trains nothing",
    "precompute-ref-log-probs": "give --dpo-reference shared or model",
}
"""Answers to names that ask for something where they are turned off."""


def switches() -> Iterator[Row]:
    of_transformers = {
        field.name.replace("_", "-") for field in fields(TrainingArguments) if "bool" in str(field.type)
    } - {"liger-kernel-config"}
    yield from (row for row in OTHERS if row.name in of_transformers)
    yield from (ROWS[name.replace("_", "-")] for name in SWITCHES.split())


@pytest.mark.parametrize("row", list(switches()), ids=lambda row: row.name)
def test_a_switch_that_is_off_asks_for_nothing(row: Row) -> None:
    for value in ("false", "False", "no", "off", "0", "f", "n"):
        said = alone(row, value)
        if row.name in OFF_ANSWERS:
            assert said == f"{OFF_ANSWERS[row.name]}."
        else:
            assert LEAVE in said
            assert "give" not in said
    assert len({alone(row, value) for value in ("true", "True", "t", "yes", "y", "on", "1")}) == 1


def alone(row: Row, value: str) -> str:
    """The answer to a value without the name."""
    return row.refusal("", [value]).removeprefix(": ")


def test_a_switch_of_megatron_lm_s_keeps_its_word() -> None:
    assert answers("--fp16 False") == ["--fp16 False: a switch takes no value; leave it out."]
    assert answers("--fp16=false") == ["--fp16=false: a switch takes no value; leave it out."]
    assert answers("--fp16 True") == ["--fp16 True: 16-bit training is in bf16; give --bf16."]
    assert answers("--fp16") == ["--fp16: 16-bit training is in bf16; give --bf16."]


def test_a_file_turns_switches_on_and_off_with_every_word_of_yaml(tmp_path: Path) -> None:
    file = tmp_path / "llama.yaml"
    file.write_text("gradient_checkpointing: on\nuse_dft_loss: on\ngroup_by_length: off\nloss_scale: all\nbeta: 0.1\n")
    assert answers(f"--config {file}") == [
        f"{file}:1: gradient_checkpointing on: {ROWS['gradient-checkpointing'].words}.",
        f"{file}:2: use_dft_loss on: give --objective dft.",
        f"{file}:3: group_by_length off: leave it out.",
        f"{file}:4: loss_scale all: give --loss-on all.",
        # A file may have options of other commands.
        f"{file}:5: beta 0.1: give --dpo-beta 0.1.",
    ]


def test_chat_templates_by_name_are_those_that_are_built_in() -> None:
    assert set(conversions.CHAT_TEMPLATES) == set(BUILT_IN)
