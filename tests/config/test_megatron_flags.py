"""The table of Megatron-LM's flags, and what a command line or a file with them is told.

Run: pytest tests/config/test_megatron_flags.py
"""

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from hft_megatron.cli.entry import commands
from hft_megatron.cli.training_command import TrainingOptions
from hft_megatron.config.checkpoint import CheckpointConfig
from hft_megatron.config.flags import Flag, Mistake, flags_of, items_of_arguments, named
from hft_megatron.config.loading import load_options, options_of, stages_of_file, with_checkpoint_args, write_resolved
from hft_megatron.config.megatron_flags import (
    MEGATRON_DEFAULTS,
    OF_OTHER_COMMANDS,
    ROWS,
    SECTIONS,
    VALUES_NOT_HAD,
)
from hft_megatron.config.model import ModelConfig
from hft_megatron.config.run import RunConfig
from hft_megatron.config.validation import shape_of, validate
from hft_megatron.errors import UserError
from hft_megatron.methods.registry import DECLARED
from tests.support import published_scripts

FLAGS = flags_of(RunConfig)
NAMES = Path(__file__).with_name("megatron_lm_flags.txt")
"""Names of Megatron-LM's parser, from core_r0.8 to what becomes 0.20: one a line, with ``=`` where a value follows and
``=*`` where several do."""


def published() -> Iterator[tuple[str, str]]:
    """Name and kind of every flag of Megatron-LM's parser."""
    for line in NAMES.read_text(encoding="utf-8").splitlines():
        name, has_value, several = line.partition("=")
        yield name, "several" if several else "value" if has_value else "switch"


def kind_of(flag: Flag) -> str:
    return "switch" if flag.is_switch else "several" if flag.takes_several else "value"


def said_of(method: str, words: Sequence[str], note: Callable[[str], None] | None = None) -> list[str]:
    """The lines of the mistake that a command makes of these words."""
    with pytest.raises(UserError) as error:
        load_options(commands()[method].options, words, note)
    return str(error.value).splitlines()


def names_of(lines: Sequence[str]) -> list[str]:
    """The options that a list of mistakes is about."""
    return [line.split()[0].rstrip(":") for line in lines]


def test_every_flag_of_megatron_lm_is_an_option_or_a_row_that_takes_as_many_words() -> None:
    found = list(published())
    assert len(found) > 900
    assert [name for name, _ in found if named(name, FLAGS) is None] == []
    ours = {name: row.kind for name, row in ROWS.items()} | {name: kind_of(flag) for name, flag in FLAGS.items()}
    assert {name: (kind, ours[name]) for name, kind in found if ours.get(name, kind) != kind} == {}


def test_no_flag_of_the_table_falls_through_to_not_an_option() -> None:
    values = {"switch": [], "value": ["1"], "several": ["1", "2"]}
    kinds = dict(published()) | {row.name: row.kind for row in ROWS.values()}
    for method in DECLARED:
        flags = flags_of(commands()[method].options)
        for name, kind in kinds.items():
            items = list(items_of_arguments([f"--{name}", *values[kind], "--lr", "1"], flags))
            assert len(items) == 2, name
            assert not isinstance(items[0], Mistake), items[0]


def test_what_is_an_option_has_no_row_in_the_table() -> None:
    """A row of an option that is new must go, and its name is then taken for the option."""
    assert [name for name in ROWS if isinstance(named(name, FLAGS), Flag) and ROWS[name].state != "other name"] == []
    assert [name for name in ROWS if name in FLAGS] == []
    rows = [row.name for section in SECTIONS for row in section.rows]
    assert len(rows) == len(ROWS), "two rows have one name"


def test_other_names_mean_options_that_take_as_many_words() -> None:
    others = [row for row in ROWS.values() if row.state == "other name"]
    assert len(others) > 2
    for row in others:
        meant = FLAGS[row.words.removeprefix("no-")]
        assert (row.kind, meant.is_switch) in (("value", False), ("switch", True))
        assert not meant.takes_several


def test_a_switch_of_megatron_lm_s_can_be_the_opposite_of_one_here(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for written, value in (("true", False), ("false", True)):
        file.write_text(f"grad_reduce_in_bf16: {written}\n")
        options = load_options(TrainingOptions, ["--config", str(file)])
        assert options.training.accumulate_allreduce_grads_in_fp32 is value
        of_a_call = options_of(RunConfig, {"grad_reduce_in_bf16": written == "true"})
        assert of_a_call.training.accumulate_allreduce_grads_in_fp32 is value
    for words, value in ((["--grad-reduce-in-bf16"], False), (["--accumulate-allreduce-grads-in-fp32"], True)):
        assert load_options(TrainingOptions, words).training.accumulate_allreduce_grads_in_fp32 is value


def test_what_is_said_of_options_is_still_true() -> None:
    for values, row in VALUES_NOT_HAD.items():
        assert not set(values) & set(FLAGS[row.name].option.choices), row.name
    for name in OF_OTHER_COMMANDS:
        having = [method for method in DECLARED if name in flags_of(commands()[method].options)]
        assert 0 < len(having) < len(DECLARED), name
    defaults = {
        field.name.replace("_", "-"): field.default
        for group in get_type_hints(RunConfig).values()
        for field in fields(group)
    }
    assert [name for name, value in MEGATRON_DEFAULTS.items() if str(defaults[name]) == value] == []


def test_a_flag_without_effect_is_accepted_and_noted_in_one_line() -> None:
    notes: list[str] = []
    words = (
        "--swiglu --lr 1 --attention_dropout=0 --cp-comm-type p2p a2a --normalization RMSNorm --encoder-num-layers 3"
    )
    options = load_options(TrainingOptions, words.split(), notes.append)
    assert notes == [
        "> accepted without effect here: --swiglu, --attention-dropout 0, --cp-comm-type p2p a2a, "
        "--normalization RMSNorm"
    ]
    assert (options.optimizer.lr, options.model.num_layers) == (1.0, 3)
    assert load_options(TrainingOptions, [], notes.append) == TrainingOptions()
    assert len(notes) == 1


def test_all_that_cannot_be_had_is_listed_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("fp16: true\nswiglu: true\nlrr: 1\nmoe_grouped_gemm: false\n")
    words = "--num-experts 8 a b --trian-iters 5 c --swiglu --hidden-dropout 0.1 --bf16 true d --lr"
    assert said_of("sft", ["--config", str(file), *words.split()]) == [
        "8 options are not valid:",
        f"  {file}:1: fp16: 16-bit training is in bf16; give --bf16.",
        f"  {file}:3: lrr is not an option; the nearest is --lr.",
        "  --num-experts 8: mixtures of experts are not built; only dense LLaMA models train.",
        "  --trian-iters is not an option; the nearest is --train-iters.",
        "  --hidden-dropout 0.1: nothing is dropped; leave it out, or give 0.0.",
        "  --bf16 true: a switch takes no value; write --bf16.",
        "  The word 'd' belongs to no option; options start with --, and --help-all shows which take several values.",
        "  --lr needs a value: a number of at least 0.",
    ]


def test_a_value_given_later_takes_an_earlier_one_back(tmp_path: Path) -> None:
    notes: list[str] = []
    file = tmp_path / "run.yaml"
    file.write_text("attention-dropout: 0.1\ncontext-parallel-size: 2\n")
    words = "--attention-dropout 0.0 --context-parallel-size 1 --hidden-dropout 0.1 --hidden-dropout 0"
    load_options(TrainingOptions, ["--config", str(file), *words.split()], notes.append)
    assert notes == [
        "> accepted without effect here: --attention-dropout 0.0, --context-parallel-size 1, --hidden-dropout 0"
    ]
    words += " --attention-dropout 0.2"
    assert said_of("sft", words.split())[0].startswith("--attention-dropout 0.2: nothing is dropped")


def test_a_call_is_answered_from_the_table_too() -> None:
    assert options_of(RunConfig, {"swiglu": True, "fp16": False, "encoder_num_layers": 2}).model.num_layers == 2
    with pytest.raises(UserError, match=r"^fp16: 16-bit training is in bf16") as error:
        options_of(RunConfig, {"fp16": True})
    assert "\n" not in str(error.value)


NOT_BUILT_FOR_LLAMA3 = [
    "--apply-layernorm-1p",
]
SCRIPTS = {
    "LLAMA3_8B_FP8_MOCK": (
        "pretrain",
        [
            *NOT_BUILT_FOR_LLAMA3,
            *("--fp8-format", "--fp8-amax-history-len", "--fp8-amax-compute-algo", "--fp8-param-gather"),
            *("--tokenizer-type", "--tiktoken-pattern"),
        ],
    ),
    "LLAMA3_8B_BF16": ("pretrain", [*NOT_BUILT_FOR_LLAMA3]),
    "LLAMA32_1B_FINETUNE": (
        "sft",
        [
            *("--use-rope-scaling", "--split", "--finetune-hf-dataset"),
            *("--eod-mask-loss", "--export-te-mcore-model"),
        ],
    ),
    "MS_SWIFT_SFT": (
        "sft",
        [
            *("--model", "--save_safetensors", "--dataset", "--sequence_parallel", "--finetune"),
            *("--cross_entropy_loss_fusion", "--num_train_epochs", "--output_dir", "--save_steps", "--max_length"),
            *("--system", "--no_save_optim", "--no_save_rng", "--dataset_num_proc"),
            *("--model_author", "--model_name"),
        ],
    ),
    "MS_SWIFT_LONG_TEXT": (
        "sft",
        [
            *("--model", "--save_safetensors", "--dataset", "--load_from_cache_file", "--split_dataset_ratio"),
            *("--packing", "--finetune", "--cross_entropy_loss_fusion", "--output_dir", "--eval_steps", "--save_steps"),
            *("--max_length", "--dataset_num_proc", "--no_save_optim", "--no_save_rng"),
            "--sequence_parallel",
        ],
    ),
}
"""Command, and what of the script cannot be had, in its order."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_published_script_is_told_at_once_exactly_what_cannot_be_had(script: str) -> None:
    method, refused = SCRIPTS[script]
    lines = said_of(method, shlex.split(getattr(published_scripts, script)))
    if len(refused) > 1:
        assert lines.pop(0) == f"{len(refused)} options are not valid:"
    assert names_of(lines) == refused


def test_megatron_lm_s_llama_example_is_a_run_without_what_cannot_be_had() -> None:
    method, refused = SCRIPTS["LLAMA3_8B_BF16"]
    words, kept, notes = shlex.split(published_scripts.LLAMA3_8B_BF16), list[str](), list[str]()
    for position, word in enumerate(words):
        name = word if word.startswith("--") else words[position - 1]
        kept += [] if name in refused else [word]
    options = load_options(commands()[method].options, kept, notes.append).as_run
    validate(options, shape_of(options.model), 8, "pretrain")
    assert options.model.num_query_groups == 8
    assert options.corpus.split == "99,1,0"
    assert notes == [
        "> accepted without effect here: --use-mcore-models, --group-query-attention, "
        "--position-embedding-type rope, --rotary-percent 1.0, --attention-dropout 0.0, --hidden-dropout 0.0, "
        "--swiglu, --normalization RMSNorm, --attention-backend fused, --disable-bias-linear, "
        "--cross-entropy-loss-fusion, --calculate-per-token-loss, --use-distributed-optimizer, "
        "--context-parallel-size 1, --no-create-attention-mask-in-dataloader, --no-mmap-bin-files, "
        "--num-workers 1, --log-throughput, --ckpt-format torch_dist"
    ]


@pytest.mark.parametrize(
    ("method", "words", "said"),
    [
        ("pretrain", "--sft", "--sft: the command's name chooses it; leave it out."),
        (
            "sft",
            "--group-query-attention --num-layers 2",
            "--group-query-attention needs --num-query-groups, which Megatron-LM takes to be 1.",
        ),
        (
            "sft",
            "--seq-length 8192 --encoder-seq-length 512",
            "--seq-length and --encoder-seq-length are one option; keep one of them.",
        ),
        (
            "sft",
            "--lr -- --check",
            "2 options are not valid:|  --lr needs a value: a number of at least 0.|  The word '--' belongs "
            "to no option; options start with --, and --help-all shows which take several values.",
        ),
        ("plan", "--beta 3", "--beta is not an option; --help-all lists all of them."),
        ("convert", "--ckpt-step 5", "--ckpt-step is not an option; --help-all lists all of them."),
        ("average", "--swiglu", "--swiglu is not an option; --help-all lists all of them."),
    ],
)
def test_what_would_be_read_as_something_else_is_said(method: str, words: str, said: str) -> None:
    assert said_of(method, words.split()) == said.split("|")


def test_switches_of_a_call_are_true_or_false() -> None:
    with pytest.raises(UserError) as error:
        options_of(RunConfig, {"fp16": 1, "packing": "true", "sequence_parallel": True})
    assert str(error.value).splitlines()[1:] == [
        "  fp16 1: the value must be true or false.",
        "  packing 'true': the value must be true or false.",
    ]


def test_all_stages_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    file, notes = tmp_path / "stages.yaml", list[str]()
    file.write_text("- method: sft\n  moe_grouped_gemm: true\n- method: sft\n  fp16: true\n")
    with pytest.raises(UserError) as error:
        stages_of_file(file, RunConfig())
    assert len(str(error.value).splitlines()) == 3
    file.write_text("- method: sft\n  swiglu: true\n- method: dpo\n  lr: 1\n")
    assert [method for method, _, _ in stages_of_file(file, RunConfig(), notes.append)] == ["sft", "dpo"]
    assert notes == ["> accepted without effect here: --swiglu"]


def test_the_model_of_a_run_is_taken_where_the_command_names_none(tmp_path: Path) -> None:
    asking = CheckpointConfig(load=str(tmp_path), use_checkpoint_args=True)
    run = RunConfig(model=ModelConfig(num_layers=3, hidden_size=8))
    assert with_checkpoint_args(RunConfig(checkpoint=asking)).model == ModelConfig(), "nothing is there yet"
    write_resolved(run, tmp_path / "resolved_config.yaml")
    assert with_checkpoint_args(RunConfig(checkpoint=asking)).model == run.model
    assert with_checkpoint_args(RunConfig(checkpoint=CheckpointConfig(load=str(tmp_path)))).model == ModelConfig()
    own = RunConfig(model=ModelConfig(num_layers=4), checkpoint=asking)
    assert with_checkpoint_args(own) == own, "the run's identity compares them"
    with pytest.raises(UserError, match="--use-checkpoint-args needs --load"):
        with_checkpoint_args(RunConfig(checkpoint=CheckpointConfig(use_checkpoint_args=True)))
