"""What names of transformers, TRL, LLaMA-Factory and ms-swift are told.

Run: pytest tests/config/test_other_trainers.py
"""

import re
import shlex
from pathlib import Path

import pytest

from hft_megatron.cli.entry import commands
from hft_megatron.config import conversions
from hft_megatron.config.flags import flags_of
from hft_megatron.config.loading import load_options, options_of
from hft_megatron.config.megatron_flags import ROWS
from hft_megatron.config.megatron_rows import Row
from hft_megatron.config.other_trainers import OTHER_TRAINERS
from hft_megatron.config.run import RunConfig
from hft_megatron.data.templates import BUILT_IN
from hft_megatron.errors import UserError

OTHERS = [row for section in OTHER_TRAINERS for row in section.rows]


def answers(words: str, method: str = "sft") -> list[str]:
    """What a command says of these words, a line for each."""
    with pytest.raises(UserError) as error:
        load_options(commands()[method].options, shlex.split(words))
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
            "--lr_scheduler_type warmup_stable_decay: give --lr-decay-style WSD, and --lr-wsd-decay-iters.",
        ),
        (
            "--lr_scheduler_type polynomial",
            "--lr_scheduler_type polynomial: give --lr-decay-style with constant, linear, cosine, inverse-square-root "
            "or WSD.",
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
        ("--save_strategy no", "--save_strategy no: leave it out, and --save-interval."),
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
            "--train_type lora: leave it out; --lora-rank 8 says it.",
        ),
        ("--template llama3", "--template llama3: give --chat-template llama3."),
        ("--template qwen", "--template qwen: give --chat-template with one of plain, tulu, llama2, llama3, "),
        ("--cutoff_len 2048", "--cutoff_len 2048: give --seq-length 2048, and --long-examples truncate to cut "),
        ("--train_on_prompt true", "--train_on_prompt true: give --loss-on all."),
        ("--assistant_only_loss false", "--assistant_only_loss false: give --loss-on all."),
        ("--torch_dtype bfloat16", "--torch_dtype bfloat16: give --bf16."),
        ("--stage sft", "--stage sft: the command says it, `hft-megatron sft`; leave it out."),
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
        "--pref_loss simpo: give --dpo-loss with sigmoid, ipo, hinge for pairs, or --objective for examples.",
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


VALUES = ("", "1", "0", "-1", "0.5", "true", "false", "no", "steps", "all", "none", "x", "a/b", "1e400", "nan", "{}")


@pytest.mark.parametrize("row", OTHERS, ids=lambda row: row.name)
def test_every_value_is_answered_by_a_sentence(row: Row) -> None:
    for value in VALUES:
        words = [f"--{row.name}", *filter(None, [value])]
        if row.state == "accepted":
            continue
        [answer] = answers(shlex.join(words))
        assert answer.startswith(" ".join(words))
        assert not re.search(r"\bNone\b|  |\.\.$", answer), answer


@pytest.mark.parametrize("row", OTHERS, ids=lambda row: row.name)
def test_options_that_an_answer_names_are_options(row: Row) -> None:
    known = {f"--{name}" for command in commands().values() for name in flags_of(command.options)}
    known |= {f"--no-{name.removeprefix('--')}" for name in known} | {"--local-dir", "--max-steps", "--check"}
    convert = row.conversion
    texts = [row.words, *([convert(value, {}) for value in VALUES] if convert else [])]
    for text in texts:
        named = set(re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", text))
        assert named <= known, text


def test_chat_templates_by_name_are_those_that_are_built_in() -> None:
    assert set(conversions.CHAT_TEMPLATES) == set(BUILT_IN)
